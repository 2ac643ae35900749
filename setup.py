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
REPOSITORY = ""  # the address of the public repository; until it is set, the package index shows no links to files


def for_package_index(readme: str, repository: str) -> str:
    """README.md for a page outside of the repository: its relative links get the address.

    Without an address a link becomes its text with the path, and a picture is left out.
    """

    def link(match: re.Match) -> str:
        mark, text, path = match.groups()
        if path.startswith(("https://", "#")):
            return match[0]
        if repository:
            return f"{mark}[{text}]({repository}/{'raw' if mark else 'blob'}/main/{path})"
        if mark:
            return ""
        return text if text == path else f"{text} (`{path}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, readme)


setup(
    name="fastkd",
    version=re.search(r'__version__ = "(.+)"', (here / "fastkd/__init__.py").read_text()).group(1),
    description="Knowledge distillation of image classifiers, fast and exact",
    long_description=for_package_index((here / "README.md").read_text(), REPOSITORY),
    long_description_content_type="text/markdown",
    author="The fastkd authors",
    license="Apache-2.0",
    project_urls={"Source": REPOSITORY} if REPOSITORY else {},
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
        "fastkd.export",
        "fastkd.html_report",
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
        "fastkd.run",
        "fastkd.teacher_cache",
    ],
    package_data={
        "fastkd": ["py.typed"],
        "fastkd.data": ["*.npz"],
        "fastkd.html_report": ["*.html", "*.css"],
        "fastkd.recipes": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        'triton>=3.6; platform_system == "Linux"',
        "timm>=1.0.3",
        "safetensors>=0.4.3",
        "numpy>=1.26.4",
        "pyyaml>=6.0.1",
        "rich>=12",
        "tyro>=0.9.20",
        "docstring-parser>=0.16",
        "matplotlib>=3.8",
        "jinja2>=3.1",
    ],
    extras_require={
        "dali": DALI,
        "dali-cuda12": DALI_CUDA12,
        "dali-cuda13": DALI,
        "tensorboard": TENSORBOARD,
        "export": ["onnx", "onnxscript", "onnxruntime", "torchao"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "hf": ["transformers>=5"],
        "parquet": PARQUET,
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6"],
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
