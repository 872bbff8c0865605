"""Build hook: with SAR_FOUNDATION_CUDA=1, `pip install .` also compiles the CUDA kernels into the package.

SAR_FOUNDATION_CUDA may name architectures instead, as in SAR_FOUNDATION_CUDA=sm_90a. It needs nvcc and some seconds,
neither PyTorch nor a GPU. Without it the kernels are compiled on first use where there is an nvcc.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildKernels(build_py):
    """Compiles before the files of the packages are gathered."""

    def run(self) -> None:
        """As setuptools does, after nvcc."""
        if wanted := os.environ.get("SAR_FOUNDATION_CUDA"):
            script = Path(__file__).parent / "kernels" / "rpe_attention" / "building.py"
            architectures = [] if wanted == "1" else ["--arch", wanted]
            subprocess.run([sys.executable, str(script), "build", *architectures], check=True)
        super().run()


setup(cmdclass={"build_py": BuildKernels})
