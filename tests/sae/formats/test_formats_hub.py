"""SAEs on the hub: requests, the local cache, and errors without a network."""

import foreign
import pytest
from foreign import D, draws

import reseed
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats.files import HubPlace, download, parse_source

COMMIT = "0123456789abcdef"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub by one repository, whose snapshots are folders named by the commit."""
    import huggingface_hub

    root, asked = tmp_path / "snapshots" / COMMIT, []
    foreign.sparsify(root / "layers.3", draws())
    foreign.gemma_scope(root / "layer_1", draws())

    def snapshot_download(repo_id, *, local_files_only=False, **wanted):
        asked.append((repo_id, local_files_only, wanted))
        if not local_files_only and hub.offline:
            raise OSError("no route\nto host")
        if local_files_only and not hub.cached:
            raise FileNotFoundError("not in the cache")
        return str(root)

    class Api:
        def list_repo_files(self, repo, revision):
            if hub.offline:
                raise OSError("no route")
            return [str(f.relative_to(root)) for f in sorted(root.rglob("*")) if f.is_file()]

    hub = type("Hub", (), {"asked": asked, "offline": False, "cached": True, "root": root})
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_only_what_is_needed_is_downloaded(hub):
    assert reseed.load_sae("hub:me/saes@v1/layers.3").d_in == D
    wanted = {"revision": "v1", "allow_patterns": ["layers.3", "layers.3/*"]}
    assert hub.asked == [("me/saes", False, wanted)]
    reseed.load_sae(repo="me/saes", path="layer_1/params.npz")
    assert hub.asked[-1][2]["revision"] == "main"


def test_download_returns_the_commit(hub):
    folder, commit = download(HubPlace("me/saes", path="layers.3"))
    assert (folder.name, commit) == ("layers.3", COMMIT)


def test_without_a_network_the_cache_is_used(hub):
    hub.offline = True
    assert reseed.load_sae("hub:me/saes/layers.3").d_in == D
    assert [local for _, local, _ in hub.asked] == [False, True]


def test_an_sae_that_is_neither_online_nor_cached_is_an_error(hub):
    hub.offline, hub.cached = True, False
    with pytest.raises(CheckpointError) as error:
        reseed.load_sae("hub:me/saes/layers.3")
    assert str(error.value) == (
        "cannot get hub:me/saes@main/layers.3 from the hub, and it is not in the local cache: "
        "no route"
    )


def test_a_path_that_the_repository_lacks_is_refused(hub):
    with pytest.raises(CheckpointError, match=r"me/saes \(revision main\) has no layers.9"):
        reseed.load_sae("hub:me/saes/layers.9")


def test_a_repository_of_many_saes_is_not_downloaded_whole(hub):
    with pytest.raises(CheckpointError) as error:
        reseed.load_sae("hub:me/saes")
    assert str(error.value) == (
        "hub:me/saes@main has no SAE at its top level. Name a folder, as in hub:me/saes/layer_1; "
        "folders with weights: layer_1, layers.3"
    )
    assert hub.asked == []
    foreign.sparsify(hub.root, draws())
    assert reseed.load_sae("hub:me/saes").d_in == D
    assert hub.asked[-1][2]["allow_patterns"] == ["cfg.json", "sae.safetensors"]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("hub:a/b", HubPlace("a/b")),
        ("hub:a/b@main", HubPlace("a/b")),
        ("hub:a/b.c@v1.0/layers.3/seed1/", HubPlace("a/b.c", "v1.0", "layers.3/seed1")),
    ],
)
def test_hub_sources_are_parsed(source, place):
    assert parse_source(source) == place


def test_a_revision_may_be_given_beside_a_source():
    assert parse_source("hub:a/b/c", revision="v2") == HubPlace("a/b", "v2", "c")
    with pytest.raises(CheckpointError, match="@v1 names revision v1, but `revision` is v2"):
        parse_source("hub:a/b@v1", revision="v2")
