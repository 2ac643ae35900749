"""Build and install fastkd. The links fastkd/kernels and fastkd/bench make the two folders packages of fastkd."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
DALI_CUDA12 = ["nvidia-dali-cuda120>=1.50"]
DALI = ["nvidia-dali-cuda130>=1.50"]  # the CUDA of torch's default wheels
TENSORBOARD = ["tensorboard"]
PARQUET = ["pyarrow"]
BENCH = ["pytest", "pytest-benchmark"]

setup(
    name="fastkd",
    version=re.search(r'__version__ = "(.+)"', (here / "fastkd/__init__.py").read_text()).group(1),
    description="Knowledge distillation of image classifiers, fast and exact",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The fastkd authors",
    license="Apache-2.0",
    keywords="knowledge distillation, image classification, PyTorch, Triton, CUDA graphs",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        "fastkd",
        "fastkd.bench",
        "fastkd.bench.loaders",
        "fastkd.bench.losses",
        "fastkd.bench.scripts",
        "fastkd.bench.steps",
        "fastkd.commands",
        "fastkd.data",
        "fastkd.engine",
        "fastkd.kernels",
        "fastkd.kernels.cpu",
        "fastkd.kernels.gpu",
        "fastkd.losses",
        "fastkd.methods",
        "fastkd.methods.parts",
        "fastkd.models",
        "fastkd.models.nets",
        "fastkd.models.stages",
        "fastkd.recipes",
        "fastkd.teacher_cache",
    ],
    package_data={"fastkd": ["py.typed"], "fastkd.data": ["*.npz"], "fastkd.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        'triton>=3.6; platform_system == "Linux"',
        "timm>=1.0",
        "safetensors",
        "numpy",
        "pyyaml",
        "rich",
        "tyro>=0.9",
        "docstring-parser>=0.16",
        "matplotlib",
    ],
    extras_require={
        "dali": DALI,
        "dali-cuda12": DALI_CUDA12,
        "dali-cuda13": DALI,
        "tensorboard": TENSORBOARD,
        "hf": ["transformers>=5"],
        "parquet": PARQUET,
        "bench": BENCH,
        "test": [
            *DALI,
            *PARQUET,
            *TENSORBOARD,
            *BENCH,
            "hypothesis",
            "mypy",
            "pytest-xdist",
            "ruff==0.17.*",
            "scikit-learn",
            "transformers>=5",
        ],
    },
    entry_points={"console_scripts": ["fastkd = fastkd.cli:main"]},
)
