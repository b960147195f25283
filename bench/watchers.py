async def bench_watchers() -> None:
    pass
