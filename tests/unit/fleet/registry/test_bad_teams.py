"""What a team can do that holds its own key and the online keys: nothing to other people's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    MetaFile,
    SuccinctRoles,
    TargetFile,
    Targets,
)

from edge_contract.canonical import sha256_hex
from edge_contract.errors import BundleRejected, Reason
from edge_contract.manifest import target_name
from fleet.registry import repository, shelves, signing, trust
from fleet.registry.draft import Draft
from tests.support.ngclient import Client
from tests.support.registry_folder import RegistryFolder
from tests.unit.fleet import samples

Refused = Callable[..., str]
EVIL = sha256_hex(b"evil")
REVOKED = "x-edgeward-revoked"


@contextmanager
def team(made: RegistryFolder) -> Iterator[Targets]:
    """The metadata of team vision, to be signed with its own key and the online keys alone."""
    with made.opened() as repo:
        role = repo.draft.tree.role("team-vision", "targets")
        yield role
        repo.draft.change({"team-vision"})
        assert repo.draft.needed() == {"team-vision", "snapshot", "timestamp"}
        list(repository.sign(repo, made.keyring))


def evil(name: str) -> TargetFile:
    return signing.entry(name, trust.Target(4, EVIL))


@pytest.fixture
def made(tmp_path: Path) -> RegistryFolder:
    """fashion@1 is the registry's, cam-* are vision's."""
    found = RegistryFolder.create(tmp_path)
    found.publish_many("fashion", 1)
    found.delegate("cam-*", "vision")
    found.publish_many("cam-1", 1)
    return found


def digest(made: RegistryFolder, tmp_path: Path, name: str) -> str | None:
    """What a new device finds."""
    found = Client(made.folder, tmp_path / "device", made.root.read_bytes()).find(name)
    return None if found is None else found.hashes["sha256"]


def grow(made: RegistryFolder) -> None:
    made.publish_many("digits", 70)


def delegate(made: RegistryFolder) -> None:
    made.delegate("voice", "audio")


def take_back(made: RegistryFolder) -> None:
    with made.opened() as repo:
        repo.draft.revoke_team("team-vision", True, {})
        list(repository.sign(repo, made.keyring))


@pytest.mark.parametrize("change", [grow, delegate, take_back])
def test_strays_are_never_signed_with_another_key(
    made: RegistryFolder, tmp_path: Path, change: Callable[[RegistryFolder], None]
) -> None:
    names = [target_name("fashion", "1"), target_name("fashion", "9")]
    with team(made) as role:
        role.targets.update({name: evil(name) for name in names})
    change(made)
    assert digest(made, tmp_path, names[0]) == sha256_hex(names[0].encode())
    assert digest(made, tmp_path, names[1]) is None
    with made.opened() as repo:
        own = [r for n, r in repo.draft.tree.roles.items() if shelves.team_of(n) is None]
        assert EVIL not in {t.hashes["sha256"] for r in own for t in r.targets.values()}


def test_a_stray_does_not_win_against_what_is_delegated_later(made: RegistryFolder, tmp_path: Path) -> None:
    name = target_name("fashion", "1")
    with team(made) as role:
        role.targets[name] = evil(name)
    made.delegate("fashion", "vision")
    assert digest(made, tmp_path, name) == sha256_hex(name.encode())


def bins(draft: Draft, prefix: str, bits: int) -> SuccinctRoles:
    """Bins in vision's metadata, with vision's key."""
    keys = draft.authority("team-vision").keys
    succinct = SuccinctRoles(list(keys), 1, bits, prefix)
    draft.tree.roles["team-vision"].delegations = Delegations(dict(keys), succinct_roles=succinct)
    return succinct


def test_bins_under_the_registrys_names_are_not_followed(
    tmp_path: Path, made: RegistryFolder, refused: Refused
) -> None:
    """They would shadow the registry's own bins, for which no key of the team signs."""
    _sign_bins(made, target_name("fashion", "66"))
    assert "team-vision has the bins models.2-" in _refused_teams(made)["vision"]
    made.publish_many("fashion", 70)
    assert EVIL not in {t.sha256 for t in samples.reader(made.folder).catalogue.targets.values()}
    assert digest(made, tmp_path, target_name("fashion", "66")) not in (None, EVIL)
    words = ("registry", "refresh", made.folder, "--keys", made.keys, "--also", "team-vision")
    assert "revoke --team vision" in refused(*words, code=4, reason="trust_failed")
    made.run("revoke", "--team", "vision")
    assert not _refused_teams(made)
    made.delegate("cam-*", "vision")
    made.publish_many("cam-1", 2)
    assert digest(made, tmp_path, target_name("cam-1", "2")) is not None


def test_the_registrys_bins_exchanged_for_a_teams_are_refused(
    made: RegistryFolder, tmp_path: Path, refused: Refused
) -> None:
    """Whoever has the snapshot key can make the snapshot name anything; nothing of it is believed."""
    made.publish_many("fashion", 70)
    _sign_bins(made, target_name("fashion", "66"))
    refused("registry", "list", made.folder, code=4, reason="trust_failed")
    words = ("registry", "refresh", made.folder, "--keys", made.keys, "--also", "targets")
    refused(*words, code=4, reason="trust_failed")


def _sign_bins(made: RegistryFolder, name: str) -> None:
    """Bins of vision's under the names of the registry's; each offers another content for `name`."""
    with made.opened() as repo:
        draft, now = repo.draft, repo.now()
        signers = made.keyring.signers("team-vision", draft.authority("team-vision"))
        for role in bins(draft, shelves.bin_prefix("models", 2), 2).get_roles():
            forged = Targets(version=draft.version_of(role) + 1, targets={name: evil(name)})
            judge = draft.tree.roles["team-vision"]
            repo.write(signing.sign(forged, role, signers, now, draft.periods, judge))
            draft._snapshot.meta[f"{role}.json"] = MetaFile(forged.version)
        draft.change({"team-vision"})
        list(repository.sign(repo, made.keyring))


def _refused_teams(made: RegistryFolder) -> Any:
    catalogue = samples.reader(made.folder).catalogue
    assert catalogue.targets
    return catalogue.refused_teams


def two_to_the_32(draft: Draft) -> None:
    bins(draft, shelves.bin_prefix("team-vision", 32), 32)


def roles_of_its_own(draft: Draft) -> None:
    keys = draft.authority("team-vision").keys
    role = DelegatedRole("models", list(keys), 1, True, ["models/*/*"])
    draft.tree.roles["team-vision"].delegations = Delegations(dict(keys), roles={"models": role})


def a_list_of_revoked(draft: Draft) -> None:
    draft.tree.roles["team-vision"].unrecognized_fields[REVOKED] = ["x"]


def releases_in_words(draft: Draft) -> None:
    draft.tree.roles["team-vision"].unrecognized_fields[REVOKED] = {"models/cam-1/1.json": "many"}


def another_digest(draft: Draft) -> None:
    name = target_name("cam-1", "2")
    draft.tree.roles["team-vision"].targets[name] = TargetFile(4, {"md5": "0" * 32}, name)


@pytest.mark.parametrize(
    "alter", [two_to_the_32, roles_of_its_own, a_list_of_revoked, releases_in_words, another_digest]
)
def test_metadata_of_a_team_that_says_what_it_may_not(
    made: RegistryFolder, alter: Callable[[Draft], None]
) -> None:
    """It is left out and named; everybody else goes on."""
    with made.opened() as repo:
        alter(repo.draft)
        repo.draft.change({"team-vision"})
        signers = repository.load(repo, made.keyring, repo.draft.needed())
        list(repository.publish(repo, signers))
    assert set(samples.reader(made.folder).catalogue.targets) == {
        "operators.json",
        target_name("fashion", "1"),
    }
    assert list(_refused_teams(made)) == ["vision"]
    with pytest.raises(BundleRejected) as caught:
        samples.reader(made.folder).catalogue.find(target_name("cam-1", "1"))
    assert caught.value.reason == Reason.TRUST_FAILED
    assert "team-vision" in str(caught.value)
    made.publish_many("fashion", 2)
    with pytest.raises(BundleRejected, match="team-vision"):
        made.publish_many("cam-1", 2)


def test_a_team_revokes_only_its_own_models(made: RegistryFolder) -> None:
    """The name of somebody else's next version, and a release that no counter reaches."""
    with team(made) as role:
        role.unrecognized_fields[REVOKED] = {
            target_name("fashion", "9.json"): 10**9,
            target_name("fashion", "2.0.0"): 1,
            target_name("cam-1", "9"): 9,
        }
    with made.opened() as repo:
        assert dict(repo.draft.revoked) == {target_name("cam-1", "9"): 9}
    take_back(made)
    with made.opened() as repo:
        assert dict(repo.draft.revoked) == {target_name("cam-1", "9"): 9}
