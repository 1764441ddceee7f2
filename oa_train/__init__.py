"""Learned ablations and sparse circuit masks for Hugging Face transformers.

Names are imported when they are first used, so that `import oa_train` is quick and does not import torch or Lightning;
`__init__.pyi` lists them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]
