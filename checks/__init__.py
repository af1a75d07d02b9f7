"""The catalog: one check a file. Shipped as ``trainlint.checks``; never imported under another name."""

if __name__ != "trainlint.checks":
    raise ImportError("the checks are the package trainlint.checks; importing them twice would register them twice")
