"""Settings that must be in place before JAX starts, and no time limits on Hypothesis' examples."""

import os

from hypothesis import settings

# Every warpgroup of an interpreted kernel blocks a thread of this pool, which is as large as the machine has cores.
os.environ.setdefault("PJRT_NPROC", "8")

settings.register_profile("flame", deadline=None)  # timings pass and fail nothing
settings.load_profile("flame")
