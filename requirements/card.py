"""Prints CMake's name of this machine's card: 90a for Hopper (its kernels use instructions that only the "a" target has), else the plain number."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit("specrt: `make gpu` needs a GPU and a CUDA torch (2.11 or later) in PYTHON; none was found")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
