"""The CPU kernel of this tree, compiled for tests whatever is installed.

    python tests/cpu_kernel_build.py DIRECTORY -fsanitize=address,undefined

Prints the path of the library, or nothing where there is no compiler.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).resolve().parents[1] / "kashin_jax" / "csrc"


def build(directory, *more_flags, sources=()):
    """The library in `directory`, named after its sources; None without a compiler.

    Args:
      directory: Where it goes.
      *more_flags: Of the compiler.
      sources: More of them.
    """
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        return None
    flags = [*(SOURCES / "flags.txt").read_text().split(), *more_flags, "-fPIC"]
    digest = hashlib.sha256(" ".join(command + flags).encode())
    for path in [*sorted(SOURCES.rglob("*.[ch]*")), *sources]:
        digest.update(path.read_bytes())
    library = Path(directory) / f"cpu_kernel-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with TemporaryDirectory(dir=directory) as work:
            _compile([*command, *flags], more_flags, sources, Path(work), library)
    return library


def _compile(command, link_flags, sources, work, library):
    def one(source):
        target = work / f"{source.stem}.o"
        includes = [f"-I{SOURCES}", f"-isystem{SOURCES / 'third_party'}"]
        subprocess.run([*command, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, [*sorted(SOURCES.glob("*.cc")), *sources]))
    done = work / library.name
    link = [command[0], "-shared", *link_flags, *objects, "-o", done]
    subprocess.run(link, check=True)
    # Others may be building the same.
    done.replace(library)


if __name__ == "__main__":
    print(build(*sys.argv[1:]) or "")
