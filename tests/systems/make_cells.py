"""Write a small synthetic perturbation screen: cells.h5ad and split.toml, as arc-state's data module wants them.

Run with the interpreter of the environment that holds arc-state: ``python make_cells.py FOLDER``.
Four cell types, three of them for training; eleven perturbations and a control; log-normalised counts in ``X`` and the
same matrix as ``obsm["X_hvg"]``.
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

CELLS, GENES, TYPES, PERTURBATIONS = 360, 64, 4, 11


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    cell = np.arange(CELLS)
    cell_type = cell % TYPES
    perturbation = (cell // TYPES) % (PERTURBATIONS + 1)
    rates = rng.gamma(2.0, 1.0, (TYPES, GENES))
    effects = np.exp(rng.normal(0.0, 0.5, (PERTURBATIONS + 1, GENES)))
    effects[0] = 1.0
    counts = rng.poisson(rates[cell_type] * effects[perturbation]).astype(np.float32)
    expression = np.log1p(counts / counts.sum(1, keepdims=True).clip(1) * 1e4 / GENES).astype(np.float32)
    names = np.array(["non-targeting"] + [f"gene{i}" for i in range(PERTURBATIONS)])
    cells = ad.AnnData(
        X=expression,
        obs=pd.DataFrame(
            {
                "gene": pd.Categorical(names[perturbation]),
                "cell_type": pd.Categorical([f"type{i}" for i in cell_type]),
                "gem_group": pd.Categorical([f"batch{i % 3}" for i in cell]),
            },
            index=[f"cell{i}" for i in cell],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]),
    )
    cells.var["highly_variable"] = True
    cells.obsm["X_hvg"] = expression
    cells.write_h5ad(folder / "cells.h5ad")
    (folder / "split.toml").write_text(
        "[datasets]\n"
        f'screen = "{folder.resolve() / "cells.h5ad"}"\n\n'
        '[training]\nscreen = "train"\n\n'
        '[zeroshot]\n"screen.type3" = "val"\n\n[fewshot]\n'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
