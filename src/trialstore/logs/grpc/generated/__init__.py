"""Written by ``make proto`` from the ``.proto`` files beside this folder; this file is not.

Optuna's package registers messages of the same names in protobuf's default pool, so that ours
are in a pool of their own.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
