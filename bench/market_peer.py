"""The peer of `bench market`, in a process of its own: `bench/market_peer.py NAME BROKER TOPIC URLS`.

``cryptofeed`` is its FeedHandler with its TradeKafka for each feed, as its documentation shows it;
``cryptofeed-batched``, the same with the writer that TradeKafka lacks: one for all feeds, which does not wait for the
answer to each record before it sends the next, and has the settings of ours (acks=all, idempotent, 5 ms, zstd).

* **What it does not do**: no rolling figures, no dead letters, no labels for gaps and repetitions (at a gap of Bitfinex
  it connects anew), no spool, no bound of its queues (they grow while Kafka is slow or away), no key by symbol. Prices
  become floats in its records.
* **Six of the exchanges**: its classes speak to the simulation unchanged at those in `NATIVE`; at four others
  they speak another protocol than our adapters and thus the simulation: aggregate trades, named in the URL, at Binance;
  the Advanced Trade API, which needs keys, at Coinbase; version 1 of Kraken's and of Bitget's.
* **Two things are replaced** in its process: the symbols that it would ask the REST interfaces for, and ``wss://`` of
  its addresses, as the simulation has no TLS.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping

from bench.market_contestants import NATIVE, SYMBOLS


def cryptofeed(name: str, broker: str, topic: str, urls: Mapping[str, str]) -> None:
    """The peer; says "ready" when it reads from all exchanges and is connected to Kafka."""
    import cryptofeed.connection as connection
    from cryptofeed import FeedHandler
    from cryptofeed.backends.kafka import TradeKafka
    from cryptofeed.connection import WebsocketEndpoint
    from cryptofeed.defines import TRADES as CHANNEL
    from cryptofeed.exchanges import EXCHANGE_MAP
    from cryptofeed.symbols import Symbols

    class Batched(TradeKafka):
        async def writer(self) -> None:
            await self._connect()
            while self.running:
                async with self.read_queue() as updates:
                    for update in updates:
                        value, key = self._default_serializer(update), self._default_serializer(self.key)
                        await self.producer.send(self.topic(update), value, key)
            await self.producer.stop()

    options = {"key": topic, "bootstrap_servers": broker}
    like_ours = {"acks": "all", "enable_idempotence": True, "linger_ms": 5, "compression_type": "zstd"}
    shared = Batched(**options, **like_ours) if name == "cryptofeed-batched" else None
    open_tls, plain = connection.connect, dict[str, str]()
    connection.connect = lambda address, **more: open_tls(plain[address], **more)
    handler, callbacks = FeedHandler(), []
    for exchange, url in urls.items():
        identity, symbol, native = NATIVE[exchange]
        bases = [each.partition("-")[0] for each in SYMBOLS]
        known = {symbol.format(base): native.format(as_named(exchange, base)) for base in bases}
        Symbols.set(identity, known, {"instrument_type": dict.fromkeys(known, "spot")})
        kind = EXCHANGE_MAP[identity]
        address = (
            "wss" + url.removeprefix("ws") + ("/spot" if exchange == "bybit" else "")
        )  # it takes the market from it
        plain[address] = url
        kept = kind.websocket_endpoints[1 if exchange == "bybit" else 0]
        kind.websocket_endpoints = [
            WebsocketEndpoint(address, channel_filter=kept.channel_filter, options=kept.options)
        ]
        callbacks.append(shared or TradeKafka(**options))
        handler.add_feed(kind(symbols=list(known), channels=[CHANNEL], callbacks={CHANNEL: callbacks[-1]}))

    async def say_ready() -> None:
        while True:
            handlers = [each for feed in handler.feeds for each in feed.connection_handlers]
            reading = len(handlers) == len(urls) and all(each.conn.received for each in handlers)
            if reading and all(callback.running for callback in callbacks):
                print("ready", flush=True)
                return
            await asyncio.sleep(0.05)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # it takes the thread's, and a newer uvloop makes none by itself
    ready = loop.create_task(say_ready())
    handler.run()
    ready.cancel()


def as_named(exchange: str, base: str) -> str:
    return base.lower() if exchange == "bitstamp" else base


if __name__ == "__main__":
    cryptofeed(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
