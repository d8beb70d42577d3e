"""Who may get which image, told by a clock that the test turns."""

from __future__ import annotations

from lib.active.leases import NOBODY, HandOut, Leases

IMAGES = ["a", "b", "c"]


class Clock:
    """Seconds since 1970."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def leases(minutes: float = 60.0) -> tuple[Leases, Clock]:
    clock = Clock()
    return Leases(minutes, clock), clock


def test_an_image_with_one_client_is_not_offered_to_another() -> None:
    found, _ = leases()
    found.take("a", "ann")
    assert found.order(IMAGES, "bob") == (["b", "c"], [])
    assert found.order(IMAGES, "ann") == (["b", "c"], ["a"])


def test_asking_again_releases_the_former() -> None:
    found, clock = leases()
    found.take("a", "ann")
    clock.now += 10
    found.take("b", "ann")
    assert found.order(IMAGES, "bob") == (["a", "c"], [])
    assert found.order(IMAGES, "ann") == (["c"], ["a", "b"])  # she passed over a; the longest ago comes first


def test_a_released_image_belongs_to_who_takes_it_then() -> None:
    found, clock = leases()
    for image, client in (("a", "ann"), ("b", "ann"), ("a", "bob")):
        clock.now += 1
        found.take(image, client)
    assert found.order(IMAGES, "ann") == (["c"], ["b"])
    assert found.order(IMAGES, "eve") == (["c"], [])


def test_leases_end() -> None:
    found, clock = leases(60)
    found.take("a", "ann")
    clock.now += 59 * 60
    assert found.order(IMAGES, "bob")[0] == ["b", "c"]
    assert found.until_free_s(["a"]) == 60
    clock.now += 61
    assert found.order(IMAGES, "bob") == (IMAGES, [])
    assert found.until_free_s(["a"]) == 0


def test_clients_without_a_name_cannot_be_told_apart_so_none_is_released() -> None:
    found, clock = leases()
    for image in ("a", "b"):
        clock.now += 1
        found.take(image, NOBODY)
    assert found.order(IMAGES, NOBODY) == (["c"], ["a", "b"])
    assert found.order(IMAGES, "ann") == (["c"], [])


def test_restart_takes_up_the_newest_of_every_client() -> None:
    found, clock = leases()
    old = [("a", HandOut("ann", clock.now - 100)), ("b", HandOut("ann", clock.now - 50)), ("b", HandOut("bob", 1.0))]
    found.restore(old)
    assert found.order(IMAGES, "bob") == (["a", "c"], [])
    found.restore([("c", HandOut("ann", clock.now - 7200))])  # long over
    assert "c" in found.order(IMAGES, "bob")[0]


def test_no_minutes_no_leases() -> None:
    found, _ = leases(0)
    found.take("a", "ann")
    assert found.order(IMAGES, "bob") == (IMAGES, [])


def test_an_image_opened_by_hand_is_leased_and_releases_the_one_handed_out() -> None:
    found, clock = leases()
    found.take("a", "ann")
    clock.now += 10
    found.opened("b", "ann")
    assert found.order(IMAGES, "bob") == (["a", "c"], [])
    clock.now += 59 * 60
    found.opened("b", "ann")  # still at work
    clock.now += 59 * 60
    assert found.order(IMAGES, "bob")[0] == ["a", "c"]


def test_opening_takes_no_lease_from_anybody() -> None:
    found, clock = leases()
    found.take("a", "ann")
    found.take("b", NOBODY)
    clock.now += 1
    found.opened("a", "bob")
    found.opened("b", "bob")
    assert found.order(IMAGES, "bob") == (["c"], [])
    assert found.order(IMAGES, "ann") == (["c"], ["a"])


def test_opening_what_was_released_leases_it() -> None:
    found, clock = leases()
    for image in ("a", "b"):
        clock.now += 1
        found.take(image, "ann")
    found.opened("a", "bob")
    assert found.order(IMAGES, "ann") == (["c"], ["b"])


def test_clients_without_a_name_lease_nothing_by_opening() -> None:
    found, _ = leases()
    found.opened("a", NOBODY)
    assert found.order(IMAGES, "bob") == (IMAGES, [])
