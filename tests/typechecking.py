"""The checker of annotations under pytest: beartype that takes an int for a float, as mypy and PEP 484 do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
