"""Compiles batchkern._C against the PyTorch that is already installed; pyproject.toml holds the rest."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup

MIN_TORCH = (2, 11)
VERSION = runpy.run_path(os.path.join("batchkern", "_version.py"))["__version__"]


def fail(sentence):
    sys.exit(f"batchkern: {sentence}.")


def find_toolkit():
    """The CUDA toolkit's folder and version, or None twice."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return None, None
    # The nvcc on the PATH can be a link or a wrapper script, so its place says little: the compiler
    # itself prints where its toolkit is.
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    top = re.search(r"^#\$ TOP=(.*)$", subprocess.run(command, capture_output=True, text=True).stderr, re.M)
    home = os.path.realpath(top.group(1) if top else os.path.join(os.path.realpath(nvcc), "..", ".."))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    return home, release.group(1) if release else "unknown"


def cuda_options(torch):
    """What CUDA adds to the extension, or a sentence that says why there is none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home, version = find_toolkit()
    if home is None:
        return "no nvcc was found in CUDA_HOME, on the PATH or in /usr/local/cuda"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version} and torch {torch.__version__} needs CUDA {torch.version.cuda}"
    # torch's CUDA wheels bring headers that a small toolkit lacks (cusparse.h), and libcudart under its
    # versioned name alone, which -lcudart would not find. Linking the very file that torch loads also
    # means that nothing but torch has to be there when the result is imported.
    wheels = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "*")
    folders = [os.path.join(wheels, "lib"), os.path.join(home, "lib64"), os.path.join(home, "lib")]
    cudart = [path for folder in folders for path in sorted(glob(os.path.join(folder, "libcudart.so*")))]
    if not cudart:
        return "no libcudart was found"
    os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # and this one when it compiles
    return {
        "sources": sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")),
        "include_dirs": [os.path.join(home, "include"), *sorted(glob(os.path.join(wheels, "include")))],
        "libraries": ["c10_cuda", "torch_cuda"],
        "link": cudart[:1],
        "macros": [("BATCHKERN_WITH_CUDA", "1"), ("BATCHKERN_CUDA_ARCH_LIST", f'"{architectures}"')],
    }


def build_options():
    wanted = os.environ.get("BATCHKERN_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"BATCHKERN_CUDA must be 0, 1 or unset, not {wanted!r}")
    try:
        import torch
    except ImportError:
        fail("install torch 2.11 or newer first, then build with pip's --no-build-isolation")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        fail(f"torch 2.11 or newer is needed, and torch {torch.__version__} is installed")

    cuda = cuda_options(torch) if wanted != "0" else "BATCHKERN_CUDA is 0"
    if isinstance(cuda, str):
        if wanted == "1":
            fail(f"BATCHKERN_CUDA is 1, but {cuda}")
        print(f"batchkern: building without CUDA: {cuda}.")
        cuda = {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # Debug information would make the module 20 times larger.
    extra, label = ["-g0"], ""
    if os.environ.get("BATCHKERN_SANITIZE") == "1":
        extra, label = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "-sanitized"
    # at::parallel_for is a plain loop unless the code that calls it is compiled with OpenMP.
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    extension = CppExtension(
        "batchkern._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")) + cuda.get("sources", []),
        include_dirs=cuda.get("include_dirs", []),
        libraries=cuda.get("libraries", []),
        define_macros=[("BATCHKERN_VERSION", f'"{VERSION}"'), *cuda.get("macros", [])],
        extra_compile_args={
            # Neither flag changes a value: they allow square roots and selections in vectorised loops.
            "cxx": ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *openmp, *extra],
            "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=openmp + extra + cuda.get("link", []),
    )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # One place for objects, which pip's editable install would put into a temporary folder: so
            # only what changed since the last build of any kind is compiled again.
            self.build_temp = os.path.join("build", f"torch-{torch.__version__}{label}")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**build_options())
