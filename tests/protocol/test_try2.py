from tests.protocol.test_try import *
def test_h1_dbg():
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
        for o in first.operations+second.operations: print(o)
        for j in world.bought(): print(j.id, j.created)
        print(world.record(A))
    play(story)
