"""List the packages of a wheel; everything else about it stands in pyproject.toml.

`conf/` stands at the top of the repository and is `flowrl/conf` in a wheel. pyproject.toml can say
that of a package that it lists, but there a list would hold all packages by name.
"""

from setuptools import find_namespace_packages, setup

setup(packages=[*find_namespace_packages(include=["flowrl*", "hydra_plugins*"]), "flowrl.conf"])
