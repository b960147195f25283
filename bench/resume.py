async def bench_resume() -> None:
    pass
