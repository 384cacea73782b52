"""Everything static is in pyproject.toml; native code, once there is some, is built from here."""

from setuptools import setup

setup()
