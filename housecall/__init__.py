"""Housecall: train PyTorch models on data that stays with its owners.

The public names, resolved on first use (PEP 562): importing the package costs nothing and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets as datasets
    from .cluster import LocalCluster as LocalCluster
    from .datasets import MNIST as MNIST
    from .datasets import transforms as transforms
    from .errors import (
        CodecError as CodecError,
    )
    from .errors import (
        DataError as DataError,
    )
    from .errors import (
        HousecallError as HousecallError,
    )
    from .errors import (
        IdentityError as IdentityError,
    )
    from .errors import (
        LedgerError as LedgerError,
    )
    from .errors import LimitError as LimitError
    from .errors import (
        OperatorError as OperatorError,
    )
    from .errors import (
        PlaceError as PlaceError,
    )
    from .errors import PolicyError as PolicyError
    from .errors import (
        ProgramError as ProgramError,
    )
    from .errors import (
        ProtocolError as ProtocolError,
    )
    from .errors import (
        SpentPointerError as SpentPointerError,
    )
    from .errors import (
        UnknownOperator as UnknownOperator,
    )
    from .errors import (
        UsageError as UsageError,
    )
    from .errors import (
        WorkerGone as WorkerGone,
    )
    from .identity.certificate import Identity as Identity
    from .owned.mocks import Fakes as Fakes
    from .owner.policy import Budget as Budget
    from .owner.policy import Metrics as Metrics
    from .owner.policy import Plans as Plans
    from .owner.policy import Policy as Policy
    from .owner.policy import Release as Release
    from .owner.policy import Use as Use
    from .pointers.data import FederatedDataLoader as FederatedDataLoader
    from .pointers.data import FederatedDataset as FederatedDataset
    from .pointers.hook import TorchHook as TorchHook
    from .pointers.mock import MockDataset as MockDataset
    from .pointers.module import location_of as location_of
    from .pointers.owned import OwnedDataset as OwnedDataset
    from .pointers.record import Recorded as Recorded
    from .pointers.record import record as record
    from .pointers.record import run_program as run_program
    from .pointers.record import submit_program as submit_program
    from .pointers.statistics import Count as Count
    from .pointers.statistics import Histogram as Histogram
    from .pointers.statistics import Mean as Mean
    from .pointers.statistics import Sum as Sum
    from .pointers.tensor import PointerTensor as PointerTensor
    from .pointers.tensor import send as send
    from .privacy.clip import Clip as Clip
    from .privacy.noise import Noise as Noise
    from .program.call import Call as Call
    from .program.call import Program as Program
    from .program.files import load_program as load_program
    from .remote import RemoteWorker as RemoteWorker
    from .remote import connect as connect
    from .virtual import VirtualWorker as VirtualWorker

__version__ = "0.1.0"

_HOME = {
    "Budget": "owner.policy",
    "Call": "program.call",
    "Clip": "privacy.clip",
    "CodecError": "errors",
    "Count": "pointers.statistics",
    "DataError": "errors",
    "Fakes": "owned.mocks",
    "FederatedDataLoader": "pointers.data",
    "FederatedDataset": "pointers.data",
    "Histogram": "pointers.statistics",
    "HousecallError": "errors",
    "Identity": "identity.certificate",
    "IdentityError": "errors",
    "LedgerError": "errors",
    "LimitError": "errors",
    "LocalCluster": "cluster",
    "MNIST": "datasets",
    "Mean": "pointers.statistics",
    "Metrics": "owner.policy",
    "MockDataset": "pointers.mock",
    "Noise": "privacy.noise",
    "OperatorError": "errors",
    "OwnedDataset": "pointers.owned",
    "PlaceError": "errors",
    "Plans": "owner.policy",
    "PointerTensor": "pointers.tensor",
    "Policy": "owner.policy",
    "PolicyError": "errors",
    "Program": "program.call",
    "ProgramError": "errors",
    "ProtocolError": "errors",
    "Recorded": "pointers.record",
    "Release": "owner.policy",
    "RemoteWorker": "remote",
    "SpentPointerError": "errors",
    "Sum": "pointers.statistics",
    "TorchHook": "pointers.hook",
    "UnknownOperator": "errors",
    "UsageError": "errors",
    "Use": "owner.policy",
    "VirtualWorker": "virtual",
    "WorkerGone": "errors",
    "connect": "remote",
    "load_program": "program.files",
    "location_of": "pointers.module",
    "record": "pointers.record",
    "run_program": "pointers.record",
    "send": "pointers.tensor",
    "submit_program": "pointers.record",
}

# For `from housecall import datasets, transforms`, as scripts have it from torchvision.
_MODULES = {"datasets": "datasets", "transforms": "datasets.transforms"}

__all__ = sorted((*_HOME, *_MODULES))  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'housecall' has no attribute '{name}'; the public names are {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
