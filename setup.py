"""Compiles batchkern._C against the PyTorch that is already installed; pyproject.toml holds the rest."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from glob import glob

import setuptools

MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = 77  # older ones cannot read pyproject.toml's license
GENERATIONS = ("8.0", "9.0", "10.0", "12.0")
WHEELS = "pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]'"
# What each of them brings, besides nvcc itself.
PARTS = {
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-cccl": "include/cccl/cub/cub.cuh",
}
VERSION = runpy.run_path(os.path.join("batchkern", "_version.py"))["__version__"]


def fail(sentence):
    sys.exit(f"batchkern: {sentence}.")


def find_toolkit(torch):
    """The folder of the first CUDA toolkit that can compile for this torch; or None, and why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # Wheels come before /usr/local, since whoever installed them beside torch meant them.
    wheels = sorted(glob(os.path.join(site_packages(torch), "nvidia", "cu*", "bin")))
    places = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", ""), *wheels, "/usr/local/cuda/bin"]
    problems = []
    for nvcc in filter(None, (shutil.which("nvcc", path=place) for place in places)):
        home, problem = examine(nvcc, torch)
        if not problem:
            return home, ""
        problems.append(problem)
    nowhere = f"no nvcc was found in CUDA_HOME, on the PATH, beside torch or in /usr/local/cuda ({WHEELS} brings one)"
    return None, "; ".join(dict.fromkeys(problems)) or nowhere


def examine(nvcc, torch):
    """The folder of this compiler's toolkit, and what keeps it from compiling for this torch."""
    # The nvcc on the PATH can be a link or a wrapper script, so its place says little: the compiler
    # itself prints where its toolkit is.
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    top = re.search(r"^#\$ TOP=(.*)$", subprocess.run(command, capture_output=True, text=True).stderr, re.M)
    home = os.path.realpath(top.group(1) if top else os.path.join(os.path.realpath(nvcc), "..", ".."))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = release.group().split()[1] if release else "of unknown version"
        return home, f"nvcc is {found} and torch {torch.__version__} needs CUDA {torch.version.cuda}"
    if home.startswith(os.path.join(os.path.realpath(site_packages(torch)), "")):
        missing = [wheel for wheel, path in PARTS.items() if not os.path.exists(os.path.join(home, path))]
        if missing:
            wheels = f"{' and '.join(missing)} {'brings' if len(missing) == 1 else 'bring'}"
            return home, f"{home} has an nvcc but lacks what {wheels} (run {WHEELS})"
    return home, ""


def site_packages(torch):
    """Where torch's own wheels are, too."""
    return os.path.dirname(os.path.dirname(torch.__file__))


def default_architectures(home):
    """Machine code for each generation since 8.0 that this nvcc knows, and PTX of the last for those to come.

    A driver that is older than nvcc compiles no PTX of it, so that a GPU without machine code would get no kernel.
    Two architectures more make the module 14.7 MB instead of 7.8, and its build on two cores 10 minutes instead of 7.
    """
    command = [os.path.join(home, "bin", "nvcc"), "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return ";".join(name for name in GENERATIONS if f"sm_{name.replace('.', '')}" in known) + "+PTX"


def cuda_options(torch):
    """What CUDA adds to the extension, or a sentence that says why there is none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home, problem = find_toolkit(torch)
    if home is None:
        return problem
    # torch's CUDA wheels bring headers that a small toolkit lacks (cusparse.h), and libcudart under its
    # versioned name alone, which -lcudart would not find. Linking the very file that torch loads also
    # means that nothing but torch has to be there when the result is imported.
    wheels = os.path.join(site_packages(torch), "nvidia", "*")
    folders = [os.path.join(wheels, "lib"), os.path.join(home, "lib64"), os.path.join(home, "lib")]
    cudart = [path for folder in folders for path in sorted(glob(os.path.join(folder, "libcudart.so*")))]
    if not cudart:
        return "no libcudart was found"
    os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(home)
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
    if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
        fail(f"setuptools {MIN_SETUPTOOLS} or newer is needed, and setuptools {setuptools.__version__} is installed")
    try:
        import torch
    except ImportError:
        fail(f"install torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer first, then build with pip's --no-build-isolation")
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < MIN_TORCH:
        needed = f"torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer is needed"
        fail(f"{needed}, and torch {torch.__version__} is installed")

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
        # Compiles sooner than -O3: 84 seconds on two cores instead of 117.
        extra, label = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "-sanitized"
    # at::parallel_for is a plain loop unless the code that calls it is compiled with OpenMP.
    linux = sys.platform.startswith("linux")
    openmp = ["-fopenmp"] if linux else []
    build_id = [f"-Wl,--build-id=0x{runpy.run_path('csrc/digest.py')['digest']()}"] if linux else []
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
        extra_link_args=openmp + build_id + extra + cuda.get("link", []),
    )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # One place for objects, which pip's editable install would put into a temporary folder: so
            # only what changed since the last build of any kind is compiled again.
            self.build_temp = os.path.join("build", f"torch-{torch.__version__}{label}")

    version, needs = VERSION, f">={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    if os.environ.get("BATCHKERN_WHEEL") == "1":
        # Machine code loads beside one release of torch, and CUDA's beside a torch with CUDA: a wheel says so.
        minor = f"{release[0]}.{release[1]}"
        version += f"+torch{minor}.{'cu' + torch.version.cuda.replace('.', '') if cuda else 'cpu'}"
        needs = f"=={minor}.*"
    return {
        "version": version,
        "install_requires": [f"torch{needs}", "numpy>=1.26"],
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
    }


setuptools.setup(**build_options())
