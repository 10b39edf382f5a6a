"""What was compiled, what a source distribution carries, and what a build that cannot work says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import batchkern
from batchkern import _C

ROOT = Path(__file__).resolve().parents[1]
FACTS = _C.build_facts()

# The arguments of every operator and the number of its results: kernels, autograd and fakes rely on them.
OPERATORS = {
    "cross_entropy": ("logits target class_weight ignore_index label_smoothing stats", 4),
    "cross_entropy_backward": (
        "grad_losses grad_lse logits target lse class_weight ignore_index label_smoothing",
        1,
    ),
    "trimmed_cross_entropy": ("logits target keep keep_tensor class_weight ignore_index label_smoothing", 5),
    "trimmed_cross_entropy_backward": (
        "grad logits target lse kept normalizer class_weight label_smoothing",
        1,
    ),
    "trimmed_cross_entropy_backward_": ("grad logits target lse kept normalizer class_weight label_smoothing", 0),
    "cross_entropy_losses": ("logits target losses lse entropy correct ignore_index label_smoothing", 0),
    "cross_entropy_backward_": (
        "grad_losses grad_lse logits target lse ignore_index label_smoothing first_class classes",
        0,
    ),
    "trimmed_mean": ("losses keep keep_tensor mask score weight lowest skip above samples", 3),
    "trimmed_mean_backward": ("grad kept normalizer dtype weight", 1),
    "linear_losses": (
        "hidden weight bias target dtype ignore_index label_smoothing softcap logit_scale chunk_rows stats keep_logits",
        5,
    ),
    "linear_losses_and_gradients": (
        "hidden weight bias target dtype ignore_index label_smoothing softcap logit_scale chunk_rows needs keep",
        5,
    ),
    "linear_gradients": (
        "hidden weight bias grad grad_lse target lse logits dtype ignore_index label_smoothing softcap logit_scale "
        "chunk_rows needs backward_rows keep",
        1,
    ),
    "augment_latent": (
        "x seed * gaussian dropout sigma tau drop_prob rescale_dropout basis",
        1,
    ),
    "augment_latent_backward": ("grad seed * gaussian dropout drop_prob rescale_dropout", 1),
    "soft_label_kl": ("reference_logits virtual_logits * temperature scale reference_grad virtual_grad", 4),
    "scale_gradient_": ("out gradient factor", 0),
    "rank_batches": ("losses k", 1),
}


def run_setup(**env: str) -> subprocess.CompletedProcess[str]:
    """Start setup.py far enough to see whether it accepts its environment; it builds nothing."""
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def assert_refused(result: subprocess.CompletedProcess[str], *, because: str) -> None:
    *before, last = result.stderr.strip().splitlines()
    assert result.returncode == 1
    assert last.startswith("batchkern: ")
    assert last.endswith(".")
    assert because in last
    assert not [line for line in before if "Traceback" in line]


def test_facts_name_this_version_and_this_torch() -> None:
    assert FACTS["version"] == batchkern.__version__
    assert FACTS["torch"] == torch.__version__.partition("+")[0]


def test_facts_name_the_compiler() -> None:
    name, version = FACTS["compiler"].split(" ", 1)
    assert name in ("gcc", "clang")
    assert int(version.split(".")[0]) >= 9
    assert FACTS["cxx_standard"] >= 17


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP is asked for on Linux only")
def test_openmp_is_on() -> None:
    assert FACTS["openmp"] is True  # without it at::parallel_for would be a plain loop


def test_cuda_facts_agree_with_each_other_and_with_torch() -> None:
    if FACTS["cuda"]:
        assert FACTS["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert FACTS["cuda_architectures"]
    else:
        assert FACTS["cuda_version"] is None
        assert FACTS["cuda_architectures"] == []


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_schema(name: str) -> None:
    schema = getattr(torch.ops.batchkern, name).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    keyword = [argument.name for argument in schema.arguments if argument.kwarg_only]
    arguments, results = OPERATORS[name]
    assert positional + (["*", *keyword] if keyword else []) == arguments.split()
    assert len(schema.returns) == results


def test_there_are_no_other_operators() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("batchkern::")}
    assert registered == {f"batchkern::{name}" for name in OPERATORS}


def test_only_these_operators_write_to_their_arguments() -> None:
    mutable = {name for name in OPERATORS if getattr(torch.ops.batchkern, name).default._schema.is_mutable}
    assert mutable == {
        "trimmed_cross_entropy_backward_",
        "cross_entropy_losses",
        "cross_entropy_backward_",
        "scale_gradient_",
    }


def test_setup_accepts_this_environment() -> None:
    result = run_setup(BATCHKERN_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == batchkern.__version__


def test_a_wheel_says_which_torch_it_needs(tmp_path: Path) -> None:
    """In its version and in what it requires; a build from source requires no particular one."""
    release = ".".join(torch.__version__.split(".")[:2])
    for wheel, version, needed in (
        ("1", f"{batchkern.__version__}+torch{release}.cpu", f"torch=={release}.*"),
        ("", batchkern.__version__, "torch>=2.10"),
    ):
        out = tmp_path / f"wheel {wheel}"
        out.mkdir()
        command = [sys.executable, "setup.py", "--quiet", "dist_info", "--output-dir", str(out)]
        env = {**os.environ, "BATCHKERN_CUDA": "0", "BATCHKERN_WHEEL": wheel}
        made = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        (metadata,) = out.glob("*.dist-info/METADATA")
        lines = metadata.read_text().splitlines()
        assert f"Version: {version}" in lines
        assert f"Requires-Dist: {needed}" in lines


def test_setup_refuses_a_wrong_switch() -> None:
    assert_refused(run_setup(BATCHKERN_CUDA="maybe"), because="must be 0, 1 or unset, not 'maybe'")


def test_setup_refuses_to_force_cuda_without_nvcc(tmp_path: Path) -> None:
    result = run_setup(BATCHKERN_CUDA="1", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    because = "no nvcc was found" if torch.version.cuda else "was built without CUDA"
    assert_refused(result, because=because)


def test_setup_without_nvcc_builds_for_the_cpu(tmp_path: Path) -> None:
    result = run_setup(BATCHKERN_CUDA="", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "building without CUDA: " in result.stdout


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_setup_refuses_an_nvcc_of_another_cuda(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n")
    nvcc.chmod(0o755)
    result = run_setup(BATCHKERN_CUDA="1", CUDA_HOME=str(tmp_path))
    because = "nvcc is 9.2 and torch" if torch.version.cuda else "was built without CUDA"
    assert_refused(result, because=because)


# --- which nvcc, and what it compiles for: by fakes of it, and of a torch beside which its wheels are ---------------

# What setup.py would build, as JSON, without building it.
DESCRIBE = """
import json, os, runpy, setuptools
def describe(ext_modules, **_):
    cuda = ("BATCHKERN_WITH_CUDA", "1") in ext_modules[0].define_macros
    print(json.dumps([cuda, os.environ.get("CUDA_HOME"), os.environ.get("TORCH_CUDA_ARCH_LIST")]))
setuptools.setup = describe
runpy.run_path("setup.py")
"""
WHEELS = {
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-cccl": "include/cccl/cub/cub.cuh",
    "nvidia-cuda-runtime": "lib/libcudart.so.99",
}
CODES = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_103 sm_120 sm_121"


def fake_nvcc(toolkit: Path, release: str = "99.0", codes: str = CODES) -> str:
    """A CUDA that no machine has, so that what is in /usr/local cannot matter."""
    (toolkit / "bin").mkdir(parents=True)
    script = f"""#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
--list-gpu-code) for code in {codes}; do echo $code; done ;;
--dryrun) echo '#$ TOP={toolkit}/bin/..' >&2 ;;
esac
"""
    (toolkit / "bin" / "nvcc").write_text(script)
    (toolkit / "bin" / "nvcc").chmod(0o755)
    return str(toolkit / "bin")


def fake_site(tmp_path: Path, without: str = "") -> Path:
    """A folder with a torch for CUDA 99 and nvcc's wheels, but one."""
    site = tmp_path / "site"
    (site / "torch" / "utils").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("__version__ = '2.11.0'\nclass version: cuda = '99.0'\n")
    (site / "torch" / "utils" / "__init__.py").touch()
    (site / "torch" / "utils" / "cpp_extension.py").write_text(
        "from setuptools import Extension as CppExtension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    )
    fake_nvcc(site / "nvidia" / "cu99")
    for wheel, path in WHEELS.items():
        if wheel != without:
            (site / "nvidia" / "cu99" / path).parent.mkdir(parents=True, exist_ok=True)
            (site / "nvidia" / "cu99" / path).touch()
    return site


def describe(site: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}
    environment = {**inherited, "BATCHKERN_CUDA": "1", "PYTHONPATH": str(site), "PATH": str(site / "none"), **env}
    command = [sys.executable, "-c", DESCRIBE]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


needs_shell = pytest.mark.skipif(not os.path.exists("/bin/sh"), reason="needs a shell")


@needs_shell
@pytest.mark.parametrize(
    ("on_the_path", "taken"), [(None, "wheels"), ("98.0", "wheels"), ("unknown", "wheels"), ("99.1", "PATH")]
)
def test_setup_takes_the_first_nvcc_that_fits_torch(tmp_path: Path, on_the_path: str | None, taken: str) -> None:
    site, toolkit = fake_site(tmp_path), tmp_path / "toolkit"
    path = fake_nvcc(toolkit, on_the_path) if on_the_path else str(tmp_path)
    result = describe(site, PATH=path)
    assert result.returncode == 0, result.stderr
    home = toolkit if taken == "PATH" else site / "nvidia" / "cu99"
    assert json.loads(result.stdout) == [True, str(home.resolve()), "8.0;9.0;10.0;12.0+PTX"]


@needs_shell
def test_cuda_home_is_final(tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "toolkit", "98.0")
    result = describe(fake_site(tmp_path), CUDA_HOME=str(tmp_path / "toolkit"))
    assert_refused(result, because="nvcc is 98.0 and torch 2.11.0 needs CUDA 99.0")


@needs_shell
@pytest.mark.parametrize("wheel", [*WHEELS][:3])
def test_setup_names_the_wheel_that_nvcc_lacks(tmp_path: Path, wheel: str) -> None:
    because = f"has an nvcc but lacks what {wheel} brings (run pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]')"
    assert_refused(describe(fake_site(tmp_path, without=wheel)), because=because)


@needs_shell
@pytest.mark.parametrize(
    ("codes", "wanted", "built"),
    [
        (CODES, {}, "8.0;9.0;10.0;12.0+PTX"),
        ("sm_75 sm_80 sm_90 sm_90a", {}, "8.0;9.0+PTX"),
        ("sm_90 sm_100 sm_130", {}, "9.0;10.0+PTX"),
        (CODES, {"TORCH_CUDA_ARCH_LIST": "8.6"}, "8.6"),
    ],
)
def test_the_architectures_that_are_built(tmp_path: Path, codes: str, wanted: dict[str, str], built: str) -> None:
    path = fake_nvcc(tmp_path / "toolkit", codes=codes)
    result = describe(fake_site(tmp_path), PATH=path, **wanted)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[2] == built


@pytest.mark.skipif(not FACTS["cuda"] or shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_nvcc_that_is_here_lists_its_architectures() -> None:
    result = describe(ROOT, PATH=os.environ["PATH"])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])[2].startswith("8.0;9.0")


@pytest.mark.skipif(not FACTS["cuda"], reason="needs a build with CUDA")
def test_the_extension_asks_the_driver() -> None:
    if torch.cuda.is_available():
        assert [_C.cuda_problem(device) for device in range(torch.cuda.device_count())] == [
            "" for _ in range(torch.cuda.device_count())
        ]
    else:
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.cuda_problem(0)


def test_setup_refuses_a_setuptools_that_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__, setup = '65.5.0', None")
    assert_refused(run_setup(PYTHONPATH=str(tmp_path)), because="setuptools 65.5.0 is installed")


@pytest.mark.parametrize(
    ("module", "because"),
    [
        ("raise ImportError('none here')", "install torch 2.10 or newer first"),
        ("__version__ = '2.9.1+cu128'", "torch 2.9.1+cu128 is installed"),
    ],
    ids=["missing", "old"],
)
def test_setup_refuses_a_torch_it_cannot_use(tmp_path: Path, module: str, because: str) -> None:
    (tmp_path / "torch.py").write_text(module)
    assert_refused(run_setup(PYTHONPATH=str(tmp_path)), because=because)


COMPILER = """#!/bin/sh
for word; do
    case "$last" in -c) source=$word ;; -o) object=$word ;; esac
    last=$word
done
reused="{objects}"/$(basename "$object")
case "$source" in
*/csrc/cpu/*)
    if [ -e "$reused" ] && diff -rq -x __pycache__ "${{source%/cpu/*}}" "{root}"/csrc >/dev/null; then
        exec cp "$reused" "$object"
    fi
esac
exec {cxx} "$@" -O0
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_source_distribution_builds_a_wheel_that_works(tmp_path: Path) -> None:
    # `build` makes the wheel from the unpacked source distribution, not from the checkout. It runs on a
    # copy, since setuptools would list files that an older egg-info in the checkout remembers.
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(checkout)]
    # What a wheel can lack is a file: so it is built without CUDA, not optimised, and of the objects of this checkout
    # where they are of the very same sources.
    objects = ROOT / "build" / f"torch-{torch.__version__}" / "csrc" / "cpu"
    # Of folders too, whose time changes where a file is removed.
    sources = [ROOT / "setup.py", ROOT / "csrc", *(ROOT / "csrc").rglob("*")]
    newest = max(path.stat().st_mtime for path in sources)
    built = tmp_path / "objects"
    built.mkdir()
    for path in objects.glob("*.o"):
        if path.stat().st_mtime > newest:
            (built / path.name).symlink_to(path)
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(root=ROOT, objects=built, cxx=os.environ.get("CXX", "c++")))
    compiler.chmod(0o755)
    env = {**os.environ, "BATCHKERN_CUDA": "0", "CXX": str(compiler)}
    built = subprocess.run(command, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]

    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "batchkern").rglob("*.py")}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "bench" / "results").rglob("*.json")}
    needed |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/test_build.py"}
    assert needed <= carried

    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "from batchkern import _C; print(_C.__file__); import json; print(json.dumps(_C.build_facts()))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(site)}
    imported = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr
    location, facts = imported.stdout.splitlines()
    assert Path(location).is_relative_to(site)
    assert json.loads(facts) == FACTS | {"cuda": False, "cuda_version": None, "cuda_architectures": []}
