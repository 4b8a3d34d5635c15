"""Packaging: kernels/ is installed as convwave.kernels and data/given_names/ as convwave/given_names.

The names are spelt out because a top-level package called "kernels" would clash with others of that name.
"""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "convwave/__init__.py").read_text(encoding="utf-8"))
assert version is not None

# torch for CUDA brings its own; without it, or elsewhere, the kernels are not there and everything else is
triton = 'triton>=3.6; sys_platform == "linux" and platform_machine == "x86_64"'
test = ["pytest>=8", "pytest-benchmark>=4", "hypothesis>=6.100"]

ROOMS = ["cli", "data", "infer", "ops", "runs", "train", "verify"]

setup(
    name="convwave",
    version=version[1],
    description="WaveNet-style character models as dilated causal convolutions, equal to the windowed MLP",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["convwave", *(f"convwave.{room}" for room in ROOMS), "convwave.kernels", "convwave.given_names"],
    package_dir={"convwave": "convwave", "convwave.kernels": "kernels", "convwave.given_names": "data/given_names"},
    package_data={"convwave": ["py.typed"], "convwave.given_names": ["*.txt"]},
    install_requires=["torch>=2.11", "numpy", "safetensors>=0.4", "matplotlib>=3.8", "rich>=13", triton],
    extras_require={"test": test, "dev": [*test, "ruff", "mypy"]},
    entry_points={"console_scripts": ["convwave = convwave.cli:main"]},
)
