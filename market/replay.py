"""Dead letters once more, by the adapters as they are now: topic ``dead-letter`` -> ``trades``.

They are committed when what came of them is published. What still cannot be parsed becomes a dead letter again, for the
next replay. Left early, some may come twice.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from typing import Any

from market.adapter import Adapter
from market.consumers import dead_letters
from market.display import columns, lost
from market.feeds import ADAPTERS
from market.flow import MarketOptions, MarketProgram
from market.kafka import PublisherClosed
from market.topics import DeadLetter, decode
from market.trade import BadFrame, Parsed
from runtime.loop import ends_before
from runtime.options import CannotStart


def adapter_of(exchange: str, context: str) -> Adapter:
    """A fresh one. ``BadFrame`` if there is none."""
    known = ADAPTERS.get(exchange)
    if known is None:
        raise BadFrame(f"there is no exchange {exchange!r}")
    try:
        return known.within(context) if context else known.fresh()
    except ValueError as error:
        raise BadFrame(str(error)) from None


class Replayer(MarketProgram):
    """The dead letters that are there now, once more. ``run`` once."""

    def __init__(self, options: MarketOptions, **more: Any) -> None:
        super().__init__(options, **more)
        self._adapter = functools.lru_cache(100)(adapter_of)  # its own: they know what they have read
        self.seen: Counter[tuple[str, str, str]] = Counter()
        """By exchange, outcome, reason; the rarest reasons are put together."""
        self.read = self.failed = self.found = 0
        self.early = False

    async def run(self) -> int:
        """Until all letters are read, or it is stopped; 1 if it ended early."""
        async with contextlib.AsyncExitStack() as stack:
            await self._begin(stack, publishes=not self.options.dry_run)
            try:
                self.early = not await ends_before(self._replay(), self.stop.stopped)
            except TimeoutError as error:
                raise CannotStart(str(error)) from None
            self._deadline = time.monotonic() + self.options.stop_limit
        return int(lost(self.snapshot()) > 0 or self.early)

    async def _replay(self) -> None:
        dry, kafka = self.options.dry_run, self.options.kafka
        assert kafka is not None
        letters = dead_letters(
            kafka,
            prefix=self.options.prefix,
            group=None if dry else self.options.group,
            before_commit=None if dry else self.publisher.flush,
            security=self._security,
        )
        async with contextlib.aclosing(letters) as every:  # type: ignore[type-var]
            async for letter in every:
                await self._one(letter, dry)

    def _read(self, letter: DeadLetter) -> Parsed:
        """``BadFrame`` if it still cannot be parsed."""
        if letter.kind == "trade":
            try:
                return Parsed([decode(letter.raw)], "trades")
            except ValueError as error:
                raise BadFrame(str(error)) from None
        return self._adapter(letter.exchange, letter.context).parse(letter.raw, letter.ts_recv)

    async def _one(self, letter: DeadLetter, dry: bool) -> None:
        self.read += 1
        try:
            parsed = self._read(letter)
        except BadFrame as error:
            self.failed += 1
            await self._still_bad(letter, str(error), dry)
            return
        for reason, alone in parsed.bad:  # of a frame with many, or of a whole one, as older versions left it
            await self._still_bad(letter._replace(raw=alone), reason, dry)
        trades = parsed.trades
        self._note(letter.exchange, "parsed", letter.error)
        self.found += len(trades)
        if trades and not dry:
            self._trades += len(trades)
            with contextlib.suppress(PublisherClosed):
                await self.publisher.trades(trades)

    async def _still_bad(self, letter: DeadLetter, reason: str, dry: bool) -> None:
        self._note(letter.exchange, "still bad", reason)
        if not dry:
            await self._bury(letter._replace(error=reason))

    def _note(self, exchange: str, outcome: str, reason: str) -> None:
        key = exchange, outcome, reason[:60]
        self.seen[key if key in self.seen or len(self.seen) < 1000 else (exchange, outcome, "…")] += 1

    def report(self) -> str:
        """The table of what became of the letters."""
        lines = [("exchange", "outcome", "letters", "reason")]
        lines += [(name, outcome, f"{count:,}", why) for (name, outcome, why), count in self.seen.most_common(50)]
        early = "; stopped early: some will come again" if self.early else ""
        total = f"{self.read:,} dead letters: {self.read - self.failed:,} parsed, with {self.found:,} trades;"
        return f"{columns(lines, right={2})}\n\n{total} {self.failed:,} still bad{early}"
