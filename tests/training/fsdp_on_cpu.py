"""run_pretrain with what accelerate leaves out on a CPU: its FSDP. To be launched, see test_accelerate_configs."""

import sys

from accelerate import DistributedType
from accelerate.state import PartialState

begin = PartialState.__init__


def begin_as_with_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_with_gpus
    from scbert.training.run_pretrain import main

    sys.exit(main())
