"""How the CPU kernels are compiled, for ``setup.py`` and for the first use alike. Imports nothing."""

VARIANTS: dict[str, list[str]] = {  # name -> compiler flags; the first that the processor can run is taken
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
}
# No -ffast-math: linked into a shared library, older gcc then flushes denormals in the whole process.
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared"]
