"""The inference process: Open Inference Protocol over HTTP; and what measures models as it serves them."""

import os

# Before anything here imports numpy: its BLAS would start a thread per core that no model uses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
