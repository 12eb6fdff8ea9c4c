"""The operators, by the one name that they have in Python: ``ops.rms_norm`` and so on.

Their namespace is named here and in csrc/binding/registration.h. A build with a namespace of its
own puts another file in the place of this one, as Hugging Face's kernel-builder does.
"""

import torch

from . import _library as _library  # loads them

ops = torch.ops.fused_rmsnorm
