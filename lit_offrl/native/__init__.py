"""Kernels of our own for the CPU (kernels.cpp), compiled on the machine that runs them.

A gradient step on small networks is thousands of short operations; fused, they are hundreds. The first process that
needs the kernels compiles them, in some 15 seconds, and leaves the result in a cache for all that come later. Without
a compiler everything runs on PyTorch's own kernels, more slowly and with the same results up to rounding.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "LIT_OFFRL_NATIVE"  # an environment variable: 0 leaves everything to PyTorch
SOURCE = Path(__file__).with_name("kernels.cpp")
ACTIVATIONS = ("Mish", "SiLU", "ReLU")  # that the kernels know
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),  # so that loops with roots and conditions become vectors; NaN stays NaN
)


def take(x: Tensor) -> bool:
    """Return whether the kernels can have `x`: float32 on the CPU, not under autocast."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and available()


_found: bool | None = None  # not `functools.cache`, which torch.compile does not see as a constant


def available() -> bool:
    """Load the kernels, compiled before or now, and return whether they are there."""
    global _found
    if _found is None:
        _found = _load()
    return _found


def _load() -> bool:
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return False
    compiler = os.environ.get("CXX", "c++")
    try:
        library = compiled(compiler)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        import lit_offrl.native.shapes  # noqa: F401 (it describes what has been loaded)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        print(
            f"note: no kernels for this processor, training is slower without them: {reason}. They need a C++ compiler "
            f"({compiler}, or the one that CXX names) and a cache that can be written (XDG_CACHE_HOME); {SWITCH}=0 "
            "does without",
            file=sys.stderr,
        )
        return False
    return True


def compiled(compiler: str) -> Path:
    """Return the compiled kernels for this PyTorch and processor, from the cache where they are in it.

    Raises:
        OSError: There is no compiler, or the cache cannot be written.
        CalledProcessError: The compiler fails; `stderr` tells why.
    """
    command = [compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    identity = (SOURCE.read_text(), torch.__version__, torch.version.git_version, *command, processor())
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_offrl"
    library = cache_folder / f"kernels-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no compiler {compiler}")
    import fcntl  # not on every system

    cache_folder.mkdir(parents=True, exist_ok=True)
    with (cache_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when a process ends, however it ends
        if not library.exists():
            print("note: compiling kernels for this processor, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=cache_folder) as folder:
                made, pytorch = Path(folder, library.name), Path(torch.__file__).parent
                command += (f"-I{pytorch / 'include'}", f"-I{pytorch / 'include/torch/csrc/api/include'}")
                command += (str(SOURCE), "-o", str(made), f"-L{pytorch / 'lib'}", "-ltorch_cpu", "-lc10")
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.replace(library)
    return library


def processor() -> str:
    """Return what tells instruction sets apart: a home folder may be shared by different machines."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    features = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return " ".join([platform.machine(), *features[:1]])
