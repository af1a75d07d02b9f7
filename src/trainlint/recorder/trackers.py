"""Tracking services and remote stores: a watched program opens no experiment and uploads nothing. Downloads stay real.

Most services have an environment variable for their offline or disabled mode (:func:`environment`, for the supervisor);
programs that ask for the online mode in their code are overruled when the library is imported (:func:`install`).

Not covered: services spoken to over plain HTTP by the program itself, Google Cloud Storage through ``gcsfs``, mail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .core import Recorder
from .patching import ImportHooks, wrap

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def environment(run_dir: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for the watched program; ``env`` is what it would get without them (default: this process's).

    Temporary files go to the run's scratch folder, trackers to their disabled or offline mode, and the run's stand-ins
    for ``rm`` and the like come first on ``PATH``.
    """
    env = os.environ if env is None else env
    scratch = os.path.join(run_dir, "scratch")
    temporary = scratch
    try:
        with open(os.path.join(run_dir, "tmpdir"), encoding="utf-8") as f:
            temporary = f.read().strip() or scratch
    except OSError:
        pass
    local = os.path.join(scratch, "mlruns")
    made = {
        "TMPDIR": temporary,
        "TEMP": temporary,
        "TMP": temporary,
        "PATH": os.path.join(run_dir, "shims") + os.pathsep + env.get("PATH", os.defpath),
        "WANDB_MODE": "disabled",
        "WANDB_SILENT": "true",
        "WANDB_DIR": scratch,
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "MLFLOW_TRACKING_URI": "file://" + local,
        "MLFLOW_REGISTRY_URI": "file://" + local,
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": scratch,
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "NEPTUNE_MODE": "debug",
        "CLEARML_OFFLINE_MODE": "1",
        "CLEARML_CACHE_DIR": scratch,
        "SWANLAB_MODE": "disabled",
        "AIM_REPO": scratch,
        "DVCLIVE_SAVE_DVC_EXP": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    if "TORCHINDUCTOR_CACHE_DIR" not in env:
        # Its default lies in the temporary folder: compiled kernels would be lost, and compiled anew in every watch.
        import getpass

        try:
            user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
            made["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(env.get("TMPDIR") or "/tmp", f"torchinductor_{user}")
        except (KeyError, OSError):
            pass
    return made


# --------------------------------------------------------------------------------------------- in the program

_recorder: Recorder | None = None
_reported: set[tuple[str, str]] = set()


def install(recorder: Recorder, hooks: ImportHooks) -> None:
    """Overrule online modes and uploads once the libraries are imported."""
    global _recorder
    _recorder = recorder
    uri = "file://" + os.path.join(recorder.settings.run_dir, "scratch", "mlruns")
    scratch = os.path.join(recorder.settings.run_dir, "scratch")
    hooks.on_import("wandb", _wandb)
    hooks.on_import("mlflow", lambda module: _mlflow(module, uri))
    hooks.on_import("mlflow.tracking.client", lambda module: _mlflow_client(module, uri))
    hooks.on_import("comet_ml", _comet)
    for neptune in ("neptune", "neptune_scale"):
        hooks.on_import(neptune, _neptune)
    hooks.on_import("clearml", _clearml)
    hooks.on_import("swanlab", _swanlab)
    hooks.on_import("aim", lambda module: _aim(module, scratch))
    hooks.on_import("dvclive", _dvclive)
    hooks.on_import("huggingface_hub.hf_api", _hub)
    hooks.on_import("botocore.client", _botocore)
    hooks.on_import("aiobotocore.client", _aiobotocore)
    hooks.on_import("google.cloud.storage.blob", _google_storage)


def prevented(action: str, target: str, detail: str) -> None:
    """Report once per target."""
    if _recorder is None or (action, target) in _reported or len(_reported) > 200:
        return
    _reported.add((action, target))
    try:
        at = _recorder.user_line()
        _recorder.emit("prevented", {"action": action, "target": target, "detail": detail, "at": at})
    except Exception as error:
        _recorder.problem("reporting a tracker", error)


def _forcing(service: str, **forced: Any) -> Wrapper:
    """For :func:`wrap`: call with these keyword arguments whatever the program passes."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            name = next((str(kwargs[k]) for k in ("project", "project_name", "experiment_name") if kwargs.get(k)), "")
            prevented("tracker", service, f"project {name} was not opened" if name else "kept off line")
            return original(*args, **{**kwargs, **forced})

        return replacement

    return make


def _instead(action: str, target: str, detail: str, result: Any = None) -> Wrapper:
    """For :func:`wrap`: do not call the original."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            prevented(action, target, detail)
            return result

        return replacement

    return make


def _wandb(module: ModuleType) -> None:
    wrap(module, "init", _forcing("wandb", mode="disabled"))
    wrap(module, "login", _instead("tracker", "wandb login", "not logged in", True))
    for name in ("sweep", "agent"):
        wrap(module, name, _instead("tracker", f"wandb {name}", "not started"))


def _mlflow(module: ModuleType, uri: str) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(wanted: Any = None, *args: Any, **kwargs: Any) -> Any:
            prevented("tracker", "mlflow", f"{_without_secret(wanted)} was not used")
            return original(uri, *args)

        return replacement

    wrap(module, "set_tracking_uri", make)
    wrap(module, "set_registry_uri", make)


def _mlflow_client(module: ModuleType, uri: str) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Any, tracking_uri: Any = None, registry_uri: Any = None, *args: Any, **kwargs: Any) -> None:
            if tracking_uri is not None and tracking_uri != uri:
                prevented("tracker", "mlflow", f"{_without_secret(tracking_uri)} was not used")
            original(self, uri, uri, *args, **kwargs)

        return __init__

    wrap(module.MlflowClient, "__init__", make)


def _comet(module: ModuleType) -> None:
    for name in ("Experiment", "ExistingExperiment", "APIExperiment", "ExperimentConfig"):
        owner = getattr(module, name, None)
        if isinstance(owner, type):
            wrap(owner, "__init__", _forcing("comet", disabled=True))
    wrap(module, "start", _forcing("comet", online=False))
    for name in ("login", "init"):
        wrap(module, name, _instead("tracker", "comet login", "not logged in"))


def _neptune(module: ModuleType) -> None:
    mode = "debug" if module.__name__ == "neptune" else "disabled"
    for name in ("init_run", "init_project", "init_model", "init_model_version"):
        wrap(module, name, _forcing("neptune", mode=mode))
    for name in ("Run", "Project", "Model", "ModelVersion"):
        owner = getattr(module, name, None)
        if isinstance(owner, type):
            wrap(owner, "__init__", _forcing("neptune", mode=mode))


def _clearml(module: ModuleType) -> None:
    module.Task.set_offline(True)
    wrap(module.Task, "set_offline", _instead("tracker", "clearml", "kept off line"))

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(*args: Any, **kwargs: Any) -> Any:
            prevented("tracker", "clearml", "kept off line")
            return original(*args, **kwargs)

        return init

    wrap(module.Task, "init", make)


def _swanlab(module: ModuleType) -> None:
    wrap(module, "init", _forcing("swanlab", mode="disabled"))
    wrap(module, "login", _instead("tracker", "swanlab login", "not logged in"))


def _aim(module: ModuleType, scratch: str) -> None:
    wrap(module.Run, "__init__", _forcing("aim", repo=scratch))


def _dvclive(module: ModuleType) -> None:
    wrap(module.Live, "__init__", _forcing("dvclive", save_dvc_exp=False))


def _without_secret(uri: Any) -> str:
    """A URI without user name, password and query."""
    return re.sub(r"\?.*$", "", re.sub(r"//[^/@]*@", "//", str(uri)))


# --------------------------------------------------------------------------------------------- the Hugging Face hub

_CHANGES = re.compile(
    r"^(upload_|create_|delete_|update_|move_|preupload_|super_squash|merge_pull|comment_|edit_|hide_|rename_|change_"
    r"|request_space|add_|pause_|restart_|set_|duplicate_|resume_|scale_|accept_|reject_|cancel_|grant_|enable_|disable_"
    r"|run_job|run_uv_job|like$|unlike$|push_)"
)


def _hub(module: ModuleType) -> None:
    """Every method of ``HfApi`` that changes something on the hub, and the functions made of them."""
    api = module.HfApi
    for name in [n for n in vars(api) if _CHANGES.match(n) and callable(getattr(api, n))]:
        wrap(api, name, _hub_answer(module, name))
        instance = getattr(module, "api", None)
        if instance is not None and hasattr(module, name):
            setattr(module, name, getattr(instance, name))


def _hub_answer(module: ModuleType, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            repository = kwargs.get("repo_id", args[0] if args and isinstance(args[0], str) else "")
            if name == "create_repo":
                repository = repository or kwargs.get("name", "")
            prevented("upload", f"hub: {repository}" if repository else "hub", f"{name} was not done")
            result = _quietly(lambda: _hub_result(module, name, str(repository), kwargs))
            if kwargs.get("run_as_future"):
                from concurrent.futures import Future

                done: Future[Any] = Future()
                done.set_result(result)
                return done
            return result

        return replacement

    return make


def _hub_result(module: ModuleType, name: str, repository: str, kwargs: Mapping[str, Any]) -> Any:
    """What the program expects back: it goes on to use the repository's name or the commit's address."""
    full = repository if "/" in repository else f"local/{repository or 'repository'}"
    kind = kwargs.get("repo_type")
    url = f"https://huggingface.co/{kind + 's/' if kind in ('dataset', 'space') else ''}{full}"
    if name == "create_repo":
        return module.RepoUrl(url)
    if name in ("create_commit", "upload_file", "upload_folder", "delete_file", "delete_files", "delete_folder"):
        message = kwargs.get("commit_message") or "not uploaded"
        return module.CommitInfo(
            commit_url=f"{url}/commit/{'0' * 40}", commit_message=message, commit_description="", oid="0" * 40
        )
    return None


def _quietly(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        if _recorder is not None:
            _recorder.problem("answering for the hub", error)
        return None


# --------------------------------------------------------------------------------------------- object stores

_S3_CHANGES = re.compile(r"^(Put|Delete|Create|Upload|Complete|Copy|Abort|Restore|Publish|Send|Update|Start|Run)[A-Z]")


def _s3_answer(operation: str) -> dict[str, Any]:
    return {
        "ETag": '"0"',
        "UploadId": "none",
        "Deleted": [],
        "CopyPartResult": {"ETag": '"0"'},
        "CopyObjectResult": {"ETag": '"0"'},
        "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {}, "RetryAttempts": 0},
    }


def _changes_store(client: Any, operation: str, parameters: Any) -> bool:
    service = getattr(getattr(client, "meta", None), "service_model", None)
    if getattr(service, "service_name", "") not in ("s3", "sns", "sqs", "ses", "sagemaker", "ec2", "batch", "dynamodb"):
        return False
    if not _S3_CHANGES.match(operation) or operation == "CreateSession":
        return False
    bucket = parameters.get("Bucket", "") if isinstance(parameters, dict) else ""
    prevented("upload", f"{service.service_name}: {bucket}" if service else operation, f"{operation} was not done")
    return True


def _botocore(module: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _make_api_call(self: Any, operation_name: str, api_params: Any) -> Any:
            if _changes_store(self, operation_name, api_params):
                return _s3_answer(operation_name)
            return original(self, operation_name, api_params)

        return _make_api_call

    wrap(module.BaseClient, "_make_api_call", make)


def _aiobotocore(module: ModuleType) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def _make_api_call(self: Any, operation_name: str, api_params: Any) -> Any:
            if _changes_store(self, operation_name, api_params):
                return _s3_answer(operation_name)
            return await original(self, operation_name, api_params)

        return _make_api_call

    wrap(module.AioBaseClient, "_make_api_call", make)


def _google_storage(module: ModuleType) -> None:
    for name in [n for n in vars(module.Blob) if n.startswith("upload_") or n in ("delete", "rewrite", "compose")]:
        wrap(module.Blob, name, _instead("upload", "Google Cloud Storage", f"{name} was not done"))
