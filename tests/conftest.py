"""Settings that must be in place before JAX starts."""

import os

# Every warpgroup of an interpreted kernel blocks a thread of this pool, which is as large as the machine has cores.
os.environ.setdefault("PJRT_NPROC", "8")
