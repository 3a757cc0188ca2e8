"""The one thing pyproject.toml cannot say yet: the C helper is built by cffi in API mode."""

from setuptools import setup

setup(cffi_modules=["csrc/build_pidfd.py:ffibuilder"])
