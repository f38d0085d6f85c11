import pytest, time, traceback, logging
from tests.protocol.kit import *
from prefect_eachlabs.errors import *
A, B, C = wanted(1), wanted(2), wanted(3)

async def lost_and_dead(world, item, **given):
    p = world.process(die_at="after POST", **given)
    assert await p.until_it_ends(p.obtain(item)) is None
    return p

def order(item, model=None):
    return {"model": item.model, "version": item.version, "input": item.input}

def test_h2_foreign_rows():
    async def story():
        world = World()
        await lost_and_dead(world, A)
        for _ in range(25):
            world.emulator.announce_foreign(order(wanted(9)), base_url="x")
        await world.process().obtain(A)
        world.check([A])
    play(story)

@pytest.mark.parametrize("skew", [-14*3600, -3600, 3600, 14*3600])
@pytest.mark.parametrize("count", [130, 250])
def test_h3_walk_skewed(skew, count):
    async def story():
        world = World(clock_skew_seconds=skew)
        await lost_and_dead(world, A)
        for _ in range(count):
            world.emulator.announce_foreign(order(wanted(9)), base_url="x")
        await world.process().obtain(A)
        world.check([A])
    play(story)

@pytest.mark.parametrize("fault", ["refuse", "lose"])
def test_h4_adoption_write_fails_on_the_last_look(fault):
    async def story():
        world = World("prediction:listed_late,seconds=90,next=1")
        await lost_and_dead(world, A)
        second = world.process(by_name=[("S3 PUT kit/records/item-1.json created", fault, 1)])
        await second.obtain(A)
        world.check([A])
    play(story)

@pytest.mark.parametrize("fault", ["refuse", "lose"])
def test_h4b_marker_fails(fault):
    async def story():
        world = World("prediction:listed_late,seconds=90,next=1")
        await lost_and_dead(world, A)
        second = world.process(by_name=[("S3 PUT kit/adopted", fault, 1)])
        await second.obtain(A)
        world.check([A])
    play(story)

def test_h5_echo_404():
    async def story():
        world = World("get:not_found,seconds=120")
        await lost_and_dead(world, A)
        second = world.process()
        await second.obtain(A)
        world.check([A])
    play(story)

def test_h6_fail():
    async def story():
        world = World()
        p = world.process(die_at="before POST")
        await p.until_it_ends(p.obtain(A))
        second = world.process()
        with pytest.raises(OutcomeUnknown):
            await second.obtain(A, on_ambiguous="fail")
        assert len(world.bought()) == 0
    play(story)

def test_h7_superset_live():
    """A lost and not bought; B has more fields and is live."""
    async def story():
        world = World(strict_models=False)
        a = Item.wanted("cat", item_id="a"); b = Item.wanted("cat", item_id="b", input={"seed": 1})
        p = world.process(die_at="before POST")
        await p.until_it_ends(p.obtain(a))
        second = world.process()
        settle = asyncio.ensure_future(second.obtain(a))
        await asyncio.sleep(61)
        third = world.process(freeze_at="after POST")
        other = asyncio.ensure_future(third.obtain(b))
        await third.froze.wait()
        await asyncio.sleep(50)
        third.thaw()
        await asyncio.gather(settle, other)
        world.check([a, b])
    play(story)

def test_h7b_superset_both_lost():
    async def story():
        world = World(strict_models=False)
        a = Item.wanted("cat", item_id="a"); b = Item.wanted("cat", item_id="b", input={"seed": 1})
        for item in (b, a):
            await lost_and_dead(world, item)
        second = world.process()
        await asyncio.gather(second.obtain(a), second.obtain(b))
        world.check([a, b])
    play(story)

def test_h1_freeze_then_kill():
    async def story():
        world = World("create:late,seconds=88,at=1")
        first = world.process(freeze_at="before POST")
        task = asyncio.ensure_future(first.obtain(A))
        await first.froze.wait()
        await asyncio.sleep(19)
        first.thaw()
        await asyncio.sleep(29)
        first.kill()   # the POST arrives, and is done 58 s after its sender died
        second = world.process()
        await second.obtain(A)
        await asyncio.sleep(100)
        world.check([A])
    play(story)
