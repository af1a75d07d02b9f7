"""The names of torch and its trainers that say what happens in training."""

from __future__ import annotations

import re

#: Loss modules and their functions; the value says whether the default reduction is a mean.
LOSS_MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "NLLLoss2d": "nll_loss",
    "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "KLDivLoss": "kl_div",
    "PoissonNLLLoss": "poisson_nll_loss",
    "GaussianNLLLoss": "gaussian_nll_loss",
    "MultiMarginLoss": "multi_margin_loss",
    "MultiLabelMarginLoss": "multilabel_margin_loss",
    "MultiLabelSoftMarginLoss": "multilabel_soft_margin_loss",
    "SoftMarginLoss": "soft_margin_loss",
    "HingeEmbeddingLoss": "hinge_embedding_loss",
    "CosineEmbeddingLoss": "cosine_embedding_loss",
    "MarginRankingLoss": "margin_ranking_loss",
    "TripletMarginLoss": "triplet_margin_loss",
    "TripletMarginWithDistanceLoss": "triplet_margin_with_distance_loss",
    "CTCLoss": "ctc_loss",
}
LOSS_FUNCTIONS = frozenset(LOSS_MODULES.values())

#: Modules of torch.nn by what their output is.
ACTIVATIONS = {
    "Softmax": "softmax",
    "Softmax2d": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid",
    "ReLU": "relu",
    "Tanh": "tanh",
    "GELU": "gelu",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "SiLU": "silu",
}
#: Operations of tensors and functions by the same names.
OPERATIONS = frozenset(ACTIVATIONS.values()) | {"log", "exp", "relu_", "sigmoid_", "tanh_", "gumbel_softmax", "softmin"}
#: Modules whose output is that of a linear map.
LINEAR = frozenset(
    ("Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
)
#: Modules with parameters.
PARAMETRIC = LINEAR | {
    "Embedding", "EmbeddingBag", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "MultiheadAttention",
    "Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer", "TransformerDecoderLayer",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "PReLU",
    "LazyLinear", "LazyConv2d",
}  # fmt: skip
#: Modules that behave otherwise in evaluation.
MODAL = frozenset(
    ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "BatchNorm1d",
     "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "RReLU", "LazyBatchNorm1d", "LazyBatchNorm2d")
)  # fmt: skip
#: Modules that hand their input on, as far as its meaning goes.
TRANSPARENT_MODULES = frozenset(
    ("Identity", "Flatten", "Unflatten", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")
)
CONTAINERS = frozenset(("Sequential", "ModuleList", "ModuleDict"))

#: Tensor methods and functions that change the form and not the meaning.
SAME = frozenset(
    ("view", "reshape", "squeeze", "unsqueeze", "flatten", "permute", "transpose", "contiguous", "float", "double",
     "half", "bfloat16", "to", "cuda", "cpu", "type", "type_as", "clone", "t", "T", "narrow", "expand", "expand_as",
     "index_select", "gather", "masked_select", "view_as", "reshape_as", "swapaxes", "movedim", "mT", "mH", "H",
     "requires_grad_", "retain_grad", "select", "rename", "repeat", "repeat_interleave", "cat", "stack", "concat",
     "dropout", "split", "chunk", "unbind", "movedim", "take_along_dim", "flip")
)  # fmt: skip
#: Methods that give something without a gradient.
CUT = frozenset(("detach", "item", "tolist", "numpy", "data", "detach_", "argmax", "argmin", "argsort", "long", "int"))
#: Constructors of fresh tensors.
FRESH = frozenset(
    ("torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.zeros", "torch.ones", "torch.rand", "torch.randn",
     "torch.randint", "torch.arange", "torch.full", "torch.empty", "torch.FloatTensor", "torch.LongTensor",
     "torch.Tensor", "torch.zeros_like", "torch.ones_like", "torch.rand_like", "torch.randn_like", "torch.eye",
     "torch.randperm", "torch.linspace", "torch.full_like", "torch.normal", "torch.bernoulli", "torch.multinomial")
)  # fmt: skip

#: Wrappers that hand the module they get on as the same object, for our purposes.
SAME_MODULE = re.compile(
    r"(?:^|\.)(?:DataParallel|DistributedDataParallel|DDP|compile|FullyShardedDataParallel|FSDP|convert_sync_batchnorm|"
    r"script|fully_shard|prepare_model|replicate|checkpoint_wrapper|DataParallelModel|SyncBatchNorm\.convert_\w+)$"
)
#: Methods of a module that return it.
SAME_THING = frozenset(
    ("to", "cuda", "cpu", "half", "float", "double", "bfloat16", "requires_grad_", "train", "eval", "to_empty",
     "share_memory", "apply", "type", "compile")
)  # fmt: skip

OPTIMIZER_LIBRARIES = re.compile(
    r"^(?:torch\.optim|transformers|bitsandbytes|apex|timm|torch_optimizer|pytorch_optimizer)\b"
)
OPTIMIZERS = frozenset(
    ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "LBFGS",
     "SparseAdam", "Adafactor", "Muon", "Lion", "AdamW8bit", "Adam8bit", "FusedAdam", "FusedLAMB", "Lamb", "LAMB")
)  # fmt: skip
SCHEDULER_FACTORY = re.compile(
    r"(?:^|\.)get_(?:\w+_)?(?:scheduler|schedule_with_warmup|constant_schedule|\w+_schedule)$"
)

#: How programs call these when they are handed in from where it cannot be read.
OPTIMIZER_NAME = re.compile(
    r"^(?:\w*_)?(?:optimi[sz]er|optim|opt)(?:_?\w{1,3}|_\w+)?$|^(?:\w+_)?optimi[sz]er(?:_\w+|\d)?$", re.IGNORECASE
)
SCHEDULER_NAME = re.compile(r"^(?:\w*_)?(?:lr_)?(?:scheduler|sched)(?:_?\w{1,3}|_\w+)?$", re.IGNORECASE)
SCALER_NAME = re.compile(r"^(?:\w*_)?(?:grad_?)?scaler$", re.IGNORECASE)
MODEL_NAME = re.compile(
    r"^(?:\w*_)?(?:model|net|network|generator|discriminator|encoder|decoder|backbone|policy|actor|critic)(?:_\w+|\d)?$",
    re.IGNORECASE,
)

#: Calls that take a module, an optimizer or a loss and leave gradients, weights and mode alone.
HARMLESS = re.compile(
    r"^(?:builtins\.(?:print|len|float|int|str|repr|isinstance|hasattr|range|enumerate|zip|type|id|sum|min|max|abs|"
    r"round|format|sorted|list|tuple|dict|set|all|any|bool|next|iter|vars|dir|getattr|issubclass|callable|open|super|"
    r"reversed|map|filter|hash|input|divmod|pow)|"
    r"(?:torch|numpy|math|os|sys|time|logging|json|random|copy|itertools|functools|collections|pathlib|warnings|"
    r"tqdm|wandb|torchvision|datetime|argparse|matplotlib|PIL|sklearn|pandas|mlflow|tensorboardX|neptune|"
    r"torchmetrics|evaluate|datasets|tensorboard|rich|shutil|gc|pickle|contextlib|dataclasses|typing|re|einops|cv2|"
    r"scipy|torchinfo|torchsummary|thop|psutil|inspect|glob|subprocess|string|struct|io|csv|yaml|omegaconf|hydra)\.)"
)
#: ... save for these of torch.
HARMFUL = re.compile(
    r"^torch\.(?:autograd\.(?!Variable|variable)|func|distributed\.(?:pipelining|rpc)|nn\.utils\.(?!rnn)|utils\.checkpoint)"
)
