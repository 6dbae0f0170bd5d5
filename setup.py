"""Builds the extension by calling CMake, which holds the whole build; metadata is in pyproject.toml.

    pip install --no-build-isolation .        (the torch that is installed is the torch that is built against)

CMAKE_ARGS is passed through, e.g. CMAKE_ARGS="-DSPECRT_CUDA=ON -DSPECRT_ARCH=90a"."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        """specrt/_C.so: a library that torch loads, not a Python module, so without the interpreter's suffix."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise SystemExit("specrt: cmake was not found; pip install cmake ninja")
        ninja = shutil.which("ninja", path=path)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *generator, f"-DPython3_EXECUTABLE={sys.executable}", f"-DSPECRT_OUTPUT_DIR={output}",
                        *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(self.parallel or os.cpu_count() or 1)], check=True)


setup(ext_modules=[Extension("specrt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
