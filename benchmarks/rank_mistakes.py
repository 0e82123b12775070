"""What would go wrong among ranks of a run: groups, shares, files or calls that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from fake_ranks import Collective, FakeRank, Members


def rank_mistakes(ranks: Sequence[FakeRank], *, expert_parallel_size: int) -> list[str]:
    """Say what would go wrong among some ranks of a run; nothing if they fit together.

    Where all members of a group are given, what they hold and write is checked to be the whole.
    """
    found = []
    for rank in ranks:
        found += _wrong_groups(rank, expert_parallel_size)
        found += _wrong_partitions(rank)
    by_sharing: dict[Members, list[FakeRank]] = {}
    for rank in ranks:
        by_sharing.setdefault(rank.sharing, []).append(rank)
    for members, given in by_sharing.items():
        if len(given) == len(members):
            found += _wrong_experts(given)
    found += _wrong_writers(ranks, expert_parallel_size)
    found += _wrong_collectives(ranks)
    return found


def _wrong_groups(rank: FakeRank, expert_parallel_size: int) -> list[str]:
    world, size = range(rank.world_size), expert_parallel_size
    first = rank.rank // size * size
    found = []
    if rank.sharing != tuple(range(first, first + size)):
        found.append(f"rank {rank.rank} shares experts with {_short(rank.sharing)}")
    if not rank.groups:
        return found  # all ranks share, or none: DeepSpeed took the world's group
    sharing = {tuple(range(i, i + size)) for i in range(0, rank.world_size, size)}
    copies = {tuple(world[i::size]) for i in range(size)}
    missing = (sharing | copies) - set(rank.groups)
    if missing:
        found.append(f"rank {rank.rank} made no group of {_short(min(missing))}")
    return found


def _wrong_partitions(rank: FakeRank) -> list[str]:
    found = []
    for number, part in enumerate(rank.partitions):
        whole = part.size * len(part.members)
        # DeepSpeed pads each rank's part to a few elements.
        if not part.num_elements <= whole < part.num_elements + 32 * len(part.members):
            found.append(
                f"rank {rank.rank}: {len(part.members)} parts of {part.size} elements are not the "
                f"{part.num_elements} of parameter group {number}"
            )
        if rank.rank not in part.members:
            found.append(f"rank {rank.rank} has no part of parameter group {number}")
    return found


def _wrong_experts(sharing: Sequence[FakeRank]) -> list[str]:
    found = []
    for layer, held in enumerate(zip(*(rank.expert_ids for rank in sharing), strict=True)):
        ids = sorted(i for of_rank in held for i in of_rank)
        if ids != list(range(sharing[0].num_experts)):
            found.append(f"ranks {_short(sharing[0].sharing)} hold experts {ids} of layer {layer}")
    return found


def _wrong_writers(ranks: Sequence[FakeRank], expert_parallel_size: int) -> list[str]:
    copies = [rank.rank for rank in ranks if rank.writes and rank.rank >= expert_parallel_size]
    found = [f"rank {rank} writes, but holds copies only" for rank in copies]
    files = [file for rank in ranks for file in rank.writes]
    if len(files) != len(set(files)):
        found.append(f"two ranks write the same file, one of {', '.join(sorted(set(files)))}")
    if {*range(expert_parallel_size)} <= {rank.rank for rank in ranks}:
        written = [key for rank in ranks for of_file in rank.writes.values() for key in of_file]
        whole = {key for rank in ranks for key in rank.state}
        if len(written) != len(set(written)):
            found.append("something is written twice")
        if missing := whole - set(written):
            found.append(f"nobody writes {min(missing)} and {len(missing) - 1} more")
    return found


def _wrong_collectives(ranks: Sequence[FakeRank]) -> list[str]:
    """Compare what each two ranks of a group call on it, in order."""
    calls: dict[Members, dict[int, list[Collective]]] = {}
    for rank in ranks:
        for call in rank.collectives:
            calls.setdefault(call.members, {}).setdefault(rank.rank, []).append(call)
    found = []
    by_rank = {rank.rank: rank for rank in ranks}
    for members, by_member in calls.items():
        given = [rank for rank in by_rank if rank in members]
        if strangers := set(by_member) - set(members):
            found.append(f"rank {min(strangers)} calls in a group that it is no member of")
        if silent := set(given) - set(by_member):
            found.append(f"rank {min(silent)} never calls in {_short(members)}; the others hang")
            continue
        first, *others = given
        for other in others:
            found += _differences(members, first, by_member[first], other, by_member[other])
    return found


def _differences(
    members: Members, one: int, calls: list[Collective], other: int, others: list[Collective]
) -> list[str]:
    if len(calls) != len(others):
        return [
            f"in {_short(members)}, rank {one} calls {len(calls)} times and rank {other} "
            f"{len(others)} times: they hang"
        ]
    place, other_place = members.index(one), members.index(other)
    for number, (ours, theirs) in enumerate(zip(calls, others, strict=True)):
        where = f"call {number} in {_short(members)}, of rank {one} and rank {other}:"
        if (ours.kind, ours.shape) != (theirs.kind, theirs.shape):
            return [f"{where} {ours.kind} {ours.shape} meets {theirs.kind} {theirs.shape}"]
        if ours.send and (
            ours.send[other_place] != theirs.receive[place]
            or theirs.send[place] != ours.receive[other_place]
        ):
            return [
                f"{where} {ours.send[other_place]} rows are sent and {theirs.receive[place]} "
                f"expected, {theirs.send[place]} sent back and {ours.receive[other_place]} expected"
            ]
    return []


def _short(members: Members) -> str:
    if len(members) <= 8:
        return str(list(members))
    return f"[{members[0]}, {members[1]}, .., {members[-1]}] ({len(members)} ranks)"
