"""One stream for all members of a fleet: text, forward and buffer are made once.

Each member sees its share of it as an `ActivationSource` that stands still: its own hookpoint, or,
where coders have several places, the whole rows. The fleet's trainer takes the batches and hands
them round.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sae.stream.hookpoints import choose_names
from sae.stream.source import ActivationSource, NonFiniteActivationsError, SourceState
from sae.train.fleet_members import Member


class FleetStream:
    """A source whose hookpoints are divided among members, or given whole to each.

    Attributes:
        names: of the hookpoints, in the order of `next_rows`. is_whole: whether rows hold all of
            them side by side, as coders of several places read them: there is one share then.
        log_values: what the log says of the stream since `read_log_values` was last called.
    """

    def __init__(self, source: ActivationSource, *, is_whole: bool = False):
        self.source, self.is_whole = source, is_whole
        self.names: tuple[str, ...] = getattr(source, "names", (source.name,))
        calibration_rows: Callable[[], tuple[Tensor, ...]] | None
        calibration_rows = None if is_whole else getattr(source, "calibration_rows", None)
        self.samples = calibration_rows() if calibration_rows else (source.calibration_sample(),)
        self.log_values: dict[str, float] = {}

    def place_of(self, member: Member) -> int:
        """Return which share a member reads, by its number.

        Errors: ValueError where its pattern matches several.
        """
        if self.is_whole or not member.cfg.model.hookpoint:  # or a world's rows, or a tensor's
            return 0
        found = choose_names(member.cfg.model.hookpoint, self.names)
        if len(found) != 1:
            raise ValueError(
                "`model.hookpoint` must match exactly one module for each member of a fleet; for "
                f"`{member.name}` it matches {len(found)}: {', '.join(found[:8])}. Write them out "
                "in `fleet.hookpoint`, to train one dictionary on each."
            )
        return self.names.index(found[0])

    def share(self, place: int) -> Share:
        """Return one share as a source of its own."""
        return Share(self, place)

    def forget_samples(self) -> None:
        """Give back the memory of the samples, once every member is calibrated."""
        self.samples = ()

    def read_log_values(self) -> None:
        """Ask the source, once for all members, what the log should say of it."""
        self.log_values = self.source.log_values()

    def next_rows(self, n: int, step: int) -> tuple[Tensor, ...]:
        """Return the next n rows of every share, (n, width) each, in raw units."""
        try:
            return (self.source.next_batch(n),) if self.is_whole else self.source.next_rows(n)
        except NonFiniteActivationsError as error:
            raise NonFiniteActivationsError(f"at step {step}: {error}") from error


class Share:
    """A member's part of a fleet's stream, for its state and log; an `ActivationSource`."""

    def __init__(self, stream: FleetStream, place: int):
        self.stream, self.place = stream, place
        self.names = stream.names if stream.is_whole else stream.names[place : place + 1]
        self.name = " + ".join(self.names)
        is_part = not stream.is_whole
        self.widths = (stream.samples[place].shape[1],) if is_part else stream.source.widths

    def calibration_sample(self) -> Tensor:
        """Return its part of the stream's sample, (m, d_in)."""
        return self.stream.samples[self.place]

    def reserved_rows(self) -> Tensor | None:
        """Return its part of the rows that the stream has set aside, (m, Σ widths)."""
        source = self.stream.source
        rows = getattr(source, "reserved_rows", lambda: None)()
        if rows is None or self.stream.is_whole:
            return rows
        return rows.split(list(source.widths), 1)[self.place]

    def metadata(self) -> dict[str, object]:
        """Return the origin of its activations."""
        found = self.stream.source.metadata()
        return {**found, "hook_name": self.name} if "hook_name" in found else found

    def log_values(self) -> dict[str, float]:
        """Return what the stream last read of itself."""
        return self.stream.log_values

    def warm_up(self, tell: Callable[[int, int], None]) -> None:
        """Do nothing: the stream is filled once for all."""

    def next_batch(self, n: int) -> Tensor:
        """Refuse: rows are taken for all members at once."""
        raise NotImplementedError(f"a fleet takes its batches together; {n} rows asked for alone")

    def next_rows(self, n: int) -> tuple[Tensor, ...]:
        """Refuse, as `next_batch`."""
        return (self.next_batch(n),)

    def state(self) -> SourceState:
        """Return nothing: the stream's place is saved once for all."""
        return SourceState({})

    def load_state(self, state: SourceState) -> None:
        """Do nothing, as the stream itself is loaded."""

    def close(self) -> None:
        """Do nothing."""
