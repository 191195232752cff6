"""Recordings on disk, larger than memory: zarr through xarray, appended to per batch or per step.

A store is one zarr group with one array per hook name, labelled as `Recording.to_xarray` labels it.
It is written under a temporary name beside its place and renamed when it is whole, so that a store
that can be opened is complete.

    with RecordingWriter("run.zarr", axis="step") as out:
        record_sampling(model, prompt, config, lambda step, rec: out.append(rec, t=step.t), names_filter="blocks.**@*")
    rec = open_recording("run.zarr")            # nothing is read yet
    rec.dataset                                 # xarray: step × loop × batch × pos × d_model
    rec.at(step=3)["blocks.2.hook_resid_post@1"]            # read now, as a tensor
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooks.recording import Recording, _numpy
from hooks.sites import LoopAxes, SiteSpace
from hooks.topology import Topology

if TYPE_CHECKING:
    import xarray

_LABEL_AXES = ("batch", "pos", "d_model")


class RecordingWriter:
    """Appends recordings of the same sites along ``axis``, inside a ``with`` block.

    ``axis`` is an axis that the recordings have (``batch``, ``point``), or a new one (``step``, ``run``), of
    which each recording is one entry. Raises FileExistsError if ``path`` is taken; leaves nothing behind after an
    exception. bfloat16 and float16 are stored as float32.
    """

    def __init__(self, path: str | Path, *, axis: str = "batch"):
        self.path, self.axis = Path(path), axis
        self.appended = 0
        self._names: dict[str, LoopAxes] = {}
        self._sites: list[str] = []
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")

    def __enter__(self) -> RecordingWriter:
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists: remove it, or write under another name.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if kind is None and self.appended:
            os.replace(self._partial, self.path)
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        if kind is None:
            raise ValueError(f"nothing was appended, so {self.path} was not written.")

    def append(self, recording: Recording, **labels: float | Tensor) -> None:
        """Write one recording. ``labels`` are kept beside it: numbers (``t=0.5``), or tensors [batch, pos] (tokens).

        Raises ValueError if its sites or shapes are not those of the first one.
        """
        if self.appended and list(recording) != self._sites:
            other = sorted(set(recording) ^ set(self._sites))
            raise ValueError(f"recording {self.appended} of {self.path} holds other sites than the first, {other[:3]}: "
                             "record the same sites each time, with a fixed number of loops.")
        dataset = self._labelled(recording, labels)
        if not self.appended:
            self._names = {name: recording.space.names[name] for name in recording.space.names if name in dataset}
            self._sites = list(recording)
        topology = recording.topology
        dataset.attrs = {"loopscope": json.dumps({  # at each append, since it writes the attributes anew
            "names": self._names, "reduced": recording.reduced,
            "topology": topology and [topology.n_head, topology.n_mid, topology.n_tail, topology.n_loops]})}
        if not self.appended:
            dataset.to_zarr(self._partial, mode="w", consolidated=False)
        else:
            try:
                dataset.to_zarr(self._partial, mode="a", append_dim=self.axis, consolidated=False)
            except ValueError as error:
                raise ValueError(f"recording {self.appended} does not continue {self.path} along {self.axis!r}: "
                                 f"{error}") from error
        self.appended += 1

    def _labelled(self, recording: Recording, labels: Mapping[str, float | Tensor]) -> xarray.Dataset:
        import xarray

        looped = {loop for site in recording for loop in [site.partition("@")[2]] if loop}
        arrays = {}
        for name, axes in recording.space.names.items():
            sites = [site for site in recording if site.partition("@")[0] == name]
            if not axes:
                arrays[name] = recording.to_xarray(name)
                continue
            if {site.partition("@")[2] for site in sites} != looped:
                raise ValueError(f"{name} was recorded at other loops than the other names: record all names of one "
                                 "store at the same loops.")
            if len(sites) == len(recording.space.firings(name)):
                loops = {letter or "loop": range(count) for letter, count in axes}
                array = recording.to_xarray(name)
                arrays[name] = array if "loop" in array.coords else array.assign_coords(loops)
                continue
            if len(axes) > 1:
                raise ValueError(f"{name} is nested and was recorded in part: record all its loops to store it.")
            arrays[name] = xarray.concat([_as_array(recording, site, name) for site in sites], "loop").assign_coords(
                loop=[int(site.partition("@")[2]) for site in sites])
        dataset = xarray.Dataset(arrays)
        if self.axis not in (*dataset.dims, "batch", "point"):  # those are a recording's own, never new
            dataset = dataset.expand_dims({self.axis: [self.appended]})
        if lacking := [name for name, array in dataset.data_vars.items() if self.axis not in array.dims]:
            raise ValueError(f"{lacking[0]} has no axis {self.axis!r}, its axes are "
                             f"{', '.join(map(str, dataset[lacking[0]].dims))}: append along another, such as 'step'.")
        size = dataset.sizes[self.axis]
        for key, value in labels.items():
            if isinstance(value, Tensor) and value.ndim:
                array = xarray.DataArray(_numpy(value), dims=_LABEL_AXES[:value.ndim])
                dataset[key] = array if self.axis in array.dims else array.expand_dims({self.axis: size})
            else:
                dataset[key] = (self.axis, [float(value)] * size)
        return dataset


class StoredRecording(Recording):
    """A `Recording` whose values are read when they are asked for. Close over ``dataset`` for lazy work."""

    def __init__(self, dataset: xarray.Dataset):
        about = json.loads(dataset.attrs["loopscope"])
        names = {name: tuple((letter, count) for letter, count in axes) for name, axes in about["names"].items()}
        topology = None if about["topology"] is None else Topology(*about["topology"])
        loops = {letter or "loop" for axes in names.values() for letter, _ in axes}
        axes = {name: tuple(str(d) for d in dataset[name].dims if d not in loops) for name in names}
        super().__init__({}, names, topology=topology, reduced=about["reduced"], axes=axes)
        self.dataset = dataset
        self._held = _Sites(dataset, names)

    def __repr__(self) -> str:
        return f"StoredRecording({len(self)} sites, {dict(self.dataset.sizes)})"

    def at(self, **where: Any) -> StoredRecording:
        """Part of the recording, by index along named axes: ``at(step=3)``, ``at(batch=slice(0, 8))``."""
        return StoredRecording(self.dataset.isel(where))

    def to_xarray(self, name: str) -> xarray.DataArray:
        """One name, unread; loops are an axis ``loop`` of it."""
        self.space.resolve(name)
        return self.dataset[name]


def open_recording(path: str | Path) -> StoredRecording:
    """Open a store that `RecordingWriter` finished. Reads labels only."""
    import xarray

    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a recording: it is written when RecordingWriter's block ends.")
    dataset = xarray.open_zarr(path, consolidated=False, chunks=None)
    if "loopscope" not in dataset.attrs:
        raise ValueError(f"{path} is a zarr group that RecordingWriter did not write.")
    return StoredRecording(dataset)


class _Sites(Mapping[str, Tensor]):
    """Full site names to tensors, each read from disk when it is looked up."""

    def __init__(self, dataset: xarray.Dataset, names: Mapping[str, LoopAxes]):
        self.dataset = dataset
        self.where: dict[str, tuple[str, dict[str, int]]] = {}
        for name, axes in names.items():
            if not axes:
                self.where[name] = name, {}
            elif len(axes) == 1 and not axes[0][0]:
                self.where.update({f"{name}@{int(k)}": (name, {"loop": i}) for i, k in enumerate(dataset.loop.values)})
            else:
                self.where.update({str(site): (name, dict(zip(site.axes, site.loop, strict=True)))
                                   for site in SiteSpace({name: axes}).firings(name)})

    def __getitem__(self, site: str) -> Tensor:
        name, index = self.where[site]
        return torch.from_numpy(self.dataset[name].isel({axis or "loop": i for axis, i in index.items()}).values)

    def __contains__(self, site: object) -> bool:
        return site in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def _as_array(recording: Recording, site: str, name: str) -> xarray.DataArray:
    import xarray

    value = recording[site]
    return xarray.DataArray(_numpy(value), dims=recording._dims(name, value.ndim), name=name,
                            attrs={"long_name": name, "units": "1", "definition": f"activation at {name}",
                                   **recording.attrs})


__all__ = ["RecordingWriter", "StoredRecording", "open_recording"]
