"""What pyproject.toml cannot say: `conf/` lies beside the package here, and inside of it in a wheel."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["lit_offrl*"]), "lit_offrl.conf"], package_dir={"lit_offrl.conf": "conf"})
