"""The wire formats of ten exchanges, for simulated ones on loopback.

Theory
------
* **Wires** are pure: they turn trades into frames as the exchange's documentation writes them, and answer what a client
  sends. A wire holds the state of one connection (Bitfinex's channel numbers and sequence, the last trade of each
  symbol); take a new one for each connection: `WIRES["kraken"]()`. They know nothing of the adapters that read them,
  so that a misreading is not made twice; each says where its format is written.
* The servers that speak them are in `sandbox.markets`.

Promised: a tick's price, size and id come out as they went in (Bybit makes a UUID of the id: `trade_id`); the
time is cut to what the exchange's format can hold. Prices and sizes must be plain decimal text: they are put into JSON
as they are. Not promised: books, candles, or anything else than trades.
"""

from __future__ import annotations

import functools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

SECOND = 1_000_000_000  # in nanoseconds


class Tick(NamedTuple):
    """A trade to be told. A plain tuple of these five does as well."""

    price: str
    size: str
    side: str  # the taker's: "buy" or "sell"
    id: int
    ts_ns: int


@functools.lru_cache(1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def iso(ts_ns: int, digits: int) -> str:
    """RFC 3339 text in UTC with 1 to 9 digits of a second, cut off."""
    seconds, rest = divmod(ts_ns, SECOND)
    return f"{_second(seconds)}.{rest:09d}"[: 20 + digits] + "Z"


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


_CURRENCIES = ("USDT", "USDC", "USD", "UST", "UDC", "EUR", "GBP", "BTC", "ETH")


class Wire(ABC):
    """One connection as the exchange sees it."""

    name: str
    per_frame = 1  # how many trades a frame can hold

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._symbols: list[str] = []  # subscribed on this connection
        self._last: dict[str, int] = {}  # the last trade's id of each symbol

    def welcome(self) -> list[str]:
        """What is sent on connecting, unasked."""
        return []

    def symbols_of(self, message: str | bytes) -> list[str]:
        """The native symbols that a message subscribes to; [] if it is no subscription."""
        try:
            found = self._symbols_of(json.loads(message))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return []
        return [symbol for symbol in found if type(symbol) is str]

    def acks(self, message: str | bytes) -> list[str]:
        """The answers to whatever a client sends: subscriptions, pings, rubbish."""
        symbols = self.symbols_of(message)
        if not symbols:
            return self._answer(message)
        self._symbols += [symbol for symbol in symbols if symbol not in self._symbols]
        return self._acks(json.loads(message), symbols)

    def pair(self, native: str) -> tuple[str, str]:
        """("BTC", "USD") of the exchange's name for it; USDT stays USDT."""
        for currency in _CURRENCIES:
            if native.upper().endswith(currency):
                return native.upper()[: -len(currency)].strip("-/_:"), currency
        raise ValueError(f"{self.name} has no {native}")

    def trade_id(self, number: int) -> str:
        """How a trade's id is written in its frame."""
        return str(number)

    @abstractmethod
    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        """Live trades of one symbol, as few frames as the exchange would make of them."""

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        """Past trades (given oldest first) as sent after subscribing; [] where the exchange sends none."""
        return []

    def heartbeat(self) -> list[str]:
        """What the exchange sends by itself when nothing happens; [] where it sends nothing."""
        return []

    @abstractmethod
    def error(self, text: str = "something went wrong") -> list[str]:
        """An error message."""

    def maintenance(self) -> list[str]:
        """The announcement that the connection will end, or that the exchange is down; [] where there is none."""
        return []

    @abstractmethod
    def _symbols_of(self, message: Any) -> list[Any]:
        """The symbols that a decoded subscription names; [] if it is none."""

    @abstractmethod
    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        """What acknowledges it."""

    def _answer(self, message: str | bytes) -> list[str]:
        return self.error("unknown request")


class Binance(Wire):
    """Web Socket Streams for Binance: "Trade Streams", "Live Subscribing/Unsubscribing to streams"."""

    name = "binance"

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["params"] if message["method"] == "SUBSCRIBE" else []
        return [stream.removesuffix("@trade").upper() for stream in asked if stream.endswith("@trade")]

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        return [_json({"result": None, "id": message.get("id")})]

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return [
            f'{{"e":"trade","E":{ts // 1_000_000},"s":"{native}","t":{number},"p":"{price}","q":"{size}",'
            f'"T":{ts // 1_000_000},"m":{"true" if side == "sell" else "false"},"M":true}}'
            for price, size, side, number, ts in trades
        ]

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"error": {"code": 2, "msg": f"Invalid request: {text}"}, "id": None})]

    def maintenance(self) -> list[str]:
        return [_json({"e": "serverShutdown", "E": int(self._clock() * 1000)})]


class Coinbase(Wire):
    """Exchange WebSocket Channels: "Heartbeat Channel", "Matches Channel"; "side" is the maker's there."""

    name = "coinbase"

    def _symbols_of(self, message: Any) -> list[Any]:
        return list(message["product_ids"]) if message["type"] == "subscribe" else []

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        names = [item if isinstance(item, str) else item["name"] for item in message["channels"]]
        channels = [{"name": name, "product_ids": self._symbols, "account_ids": None} for name in names]
        return [_json({"type": "subscriptions", "channels": channels})]

    def _frames(self, kind: str, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        if trades:
            self._last[native] = trades[-1][3]
        return [
            f'{{"type":"{kind}","trade_id":{number},"maker_order_id":"ac928c66-ca53-498f-9c13-a110027a60e8",'
            f'"taker_order_id":"132fb6ae-456b-4654-b4e0-d681ac05cea1","side":"{"buy" if side == "sell" else "sell"}",'
            f'"size":"{size}","price":"{price}","product_id":"{native}","sequence":{3 * number + 50},'
            f'"time":"{iso(ts, 6)}"}}'
            for price, size, side, number, ts in trades
        ]

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("match", native, trades)

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("last_match", native, trades[-1:])

    def heartbeat(self) -> list[str]:
        now = iso(int(self._clock() * SECOND), 6)
        return [
            f'{{"type":"heartbeat","sequence":{3 * self._last.get(native, 0) + 51},'
            f'"last_trade_id":{self._last.get(native, 0)},"product_id":"{native}","time":"{now}"}}'
            for native in self._symbols
        ]

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"type": "error", "message": "Failed to subscribe", "reason": text})]


class Kraken(Wire):
    """WebSocket API v2: "Trade", "Heartbeat", "Status", "Ping"."""

    name, per_frame = "kraken", 1000

    def _now(self) -> str:
        return iso(int(self._clock() * SECOND), 6)

    def _status(self, system: str) -> list[str]:
        status = {"api_version": "v2", "connection_id": 13834774380200032777, "system": system, "version": "2.0.0"}
        return [_json({"channel": "status", "data": [status], "type": "update"})]

    def welcome(self) -> list[str]:
        return self._status("online")

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["params"]
        return list(asked["symbol"]) if message["method"] == "subscribe" and asked["channel"] == "trade" else []

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        now = self._now()
        return [
            _json(
                {
                    "method": "subscribe",
                    "result": {"channel": "trade", "snapshot": True, "symbol": symbol},
                    "success": True,
                    "time_in": now,
                    "time_out": now,
                }
            )
            for symbol in symbols
        ]

    def _answer(self, message: str | bytes) -> list[str]:
        if b'"ping"' in (message if isinstance(message, bytes) else message.encode()):
            return [f'{{"method":"pong","time_in":"{self._now()}","time_out":"{self._now()}"}}']
        return self.error("Malformed request")

    def _frames(self, kind: str, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = [
            f'{{"symbol":"{native}","side":"{side}","price":{price},"qty":{size},"ord_type":"limit",'
            f'"trade_id":{number},"timestamp":"{iso(ts, 6)}"}}'
            for price, size, side, number, ts in trades
        ]
        return [f'{{"channel":"trade","type":"{kind}","data":[{",".join(items)}]}}'] if items else []

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("update", native, trades)

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("snapshot", native, trades[-50:])

    def heartbeat(self) -> list[str]:
        return ['{"channel":"heartbeat"}']

    def error(self, text: str = "something went wrong") -> list[str]:
        now = self._now()
        return [_json({"error": text, "method": "subscribe", "success": False, "time_in": now, "time_out": now})]

    def maintenance(self) -> list[str]:
        return self._status("maintenance")


class Bitstamp(Wire):
    """Websocket API v2: "Live ticker", "Subscriptions", "Heartbeat", "Maintenance and forced reconnection"."""

    name = "bitstamp"

    def _symbols_of(self, message: Any) -> list[Any]:
        channel = message["data"]["channel"] if message["event"] == "bts:subscribe" else ""
        return [channel.removeprefix("live_trades_")] if channel.startswith("live_trades_") else []

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        channel = message["data"]["channel"]
        return [_json({"event": "bts:subscription_succeeded", "channel": channel, "data": {}})]

    def _answer(self, message: str | bytes) -> list[str]:
        if b"bts:heartbeat" in (message if isinstance(message, bytes) else message.encode()):
            return ['{"event":"bts:heartbeat","channel":"","data":{"status":"success"}}']
        return self.error("Incorrect JSON format.")

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return [
            f'{{"data":{{"id":{number},"timestamp":"{ts // SECOND}","amount":{size},"amount_str":"{size}",'
            f'"price":{price},"price_str":"{price}","type":{1 if side == "sell" else 0},'
            f'"microtimestamp":"{ts // 1000}","buy_order_id":{2 * number},"sell_order_id":{2 * number + 1}}},'
            f'"channel":"live_trades_{native}","event":"trade"}}'
            for price, size, side, number, ts in trades
        ]

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"event": "bts:error", "channel": "", "data": {"code": None, "message": text}})]

    def maintenance(self) -> list[str]:
        return ['{"event":"bts:request_reconnect","channel":"","data":""}']


class Okx(Wire):
    """API v5: "WS / Trades channel", "Connect", "Notification" (64008: a service upgrade)."""

    name, per_frame = "okx", 100

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["args"] if message["op"] == "subscribe" else []
        return [item["instId"] for item in asked if item["channel"] == "trades"]

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        return [
            f'{{"event":"subscribe","arg":{{"channel":"trades","instId":"{symbol}"}},"connId":"a4d3ae55"}}'
            for symbol in symbols
        ]

    def _answer(self, message: str | bytes) -> list[str]:
        return ["pong"] if message in ("ping", b"ping") else self.error("Invalid request")

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = [
            f'{{"instId":"{native}","tradeId":"{number}","px":"{price}","sz":"{size}","side":"{side}",'
            f'"ts":"{ts // 1_000_000}","count":"1","source":"0","seqId":{3 * number}}}'
            for price, size, side, number, ts in trades
        ]
        return [f'{{"arg":{{"channel":"trades","instId":"{native}"}},"data":[{",".join(items)}]}}'] if items else []

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"event": "error", "code": "60012", "msg": text, "connId": "a4d3ae55"})]

    def maintenance(self) -> list[str]:
        text = "The connection will soon be closed for a service upgrade. Please reconnect."
        return [_json({"event": "notice", "code": "64008", "msg": text, "connId": "a4d3ae55"})]


class Bybit(Wire):
    """V5, WebSocket Stream: "Trade", "Connect" (ping, subscription)."""

    name, per_frame = "bybit", 1024
    conn_id = "d8b7a2f0-6a3c-4f0b-9c55-0f8f6a2b5e11"

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["args"] if message["op"] == "subscribe" else []
        return [topic.removeprefix("publicTrade.") for topic in asked if topic.startswith("publicTrade.")]

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        answer = {"success": True, "ret_msg": "subscribe", "conn_id": self.conn_id, "op": "subscribe"}
        return [_json(answer | ({"req_id": message["req_id"]} if "req_id" in message else {}))]

    def _answer(self, message: str | bytes) -> list[str]:
        if b'"ping"' in (message if isinstance(message, bytes) else message.encode()):
            return [_json({"success": True, "ret_msg": "pong", "conn_id": self.conn_id, "req_id": "", "op": "ping"})]
        return self.error("Params Error")

    def trade_id(self, number: int) -> str:
        return _uuid(number)

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = [
            f'{{"T":{ts // 1_000_000},"s":"{native}","S":"{"Sell" if side == "sell" else "Buy"}","v":"{size}",'
            f'"p":"{price}","L":"PlusTick","i":"{_uuid(number)}","BT":false,"RPI":false,"seq":{7 * number}}}'
            for price, size, side, number, ts in trades
        ]
        now = int(self._clock() * 1000)
        head = f'{{"topic":"publicTrade.{native}","type":"snapshot","ts":{now},"data":['
        return [f"{head}{','.join(items)}]}}"] if items else []

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"success": False, "ret_msg": f"error:{text}", "conn_id": self.conn_id, "op": "subscribe"})]


class Bitfinex(Wire):
    """WebSocket v2: "General" (info, conf, heartbeat, errors), "Trades"; sequence numbers once SEQ_ALL is asked for."""

    name = "bitfinex"
    SEQ_ALL = 65536

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._channels: dict[str, int] = {}
        self._sequence: int | None = None

    def welcome(self) -> list[str]:
        server = "cfa1bd5b-5a5c-4f6b-9c8c-3e4c4d9b8a0e"
        return [_json({"event": "info", "version": 2, "serverId": server, "platform": {"status": 1}})]

    def pair(self, native: str) -> tuple[str, str]:
        base, currency = super().pair(native[1:])
        names = {"UST": "USDT", "UDC": "USDC"}
        return names.get(base, base), names.get(currency, currency)

    def _symbols_of(self, message: Any) -> list[Any]:
        return [message["symbol"]] if message["event"] == "subscribe" and message["channel"] == "trades" else []

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        native = symbols[0]
        channel = self._channels.setdefault(native, 17470 + len(self._channels))
        answer = {"event": "subscribed", "channel": "trades", "chanId": channel, "symbol": native}
        return [_json(answer | {"pair": native[1:]})]

    def _answer(self, message: str | bytes) -> list[str]:
        try:
            asked = json.loads(message)
            if asked["event"] == "conf":
                if asked["flags"] & self.SEQ_ALL:
                    self._sequence = 0
                return [_json({"event": "conf", "status": "OK", "flags": asked["flags"]})]
            if asked["event"] == "ping":
                return [_json({"event": "pong", "ts": int(self._clock() * 1000), "cid": asked.get("cid")})]
        except (ValueError, KeyError, TypeError):
            pass
        return self.error("unknown event")

    def _end(self) -> str:
        if self._sequence is None:
            return "]"
        self._sequence += 1
        return f",{self._sequence}]"

    def _item(self, price: str, size: str, side: str, number: int, ts: int) -> str:
        return f"[{number},{ts // 1_000_000},{'-' if side == 'sell' else ''}{size},{price}]"

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        channel, frames = self._channels[native], []
        for trade in trades:
            item = self._item(*trade)
            frames.append(f'[{channel},"te",{item}{self._end()}')
            frames.append(f'[{channel},"tu",{item}{self._end()}')
        return frames

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = ",".join(self._item(*trade) for trade in reversed(trades[-30:]))
        return [f"[{self._channels[native]},[{items}]{self._end()}"]

    def heartbeat(self) -> list[str]:
        return [f'[{channel},"hb"{self._end()}' for channel in self._channels.values()]

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"event": "error", "msg": text, "code": 10300})]

    def maintenance(self) -> list[str]:
        return [
            _json({"event": "info", "code": 20060, "msg": "Entering in Maintenance mode. Please pause any activity."}),
            _json({"event": "info", "code": 20051, "msg": "Stopping. Please try to reconnect"}),
        ]


class Gemini(Wire):
    """Market Data v2: "Level 2 Data" (the subscription's answer is the book and the last 50 trades)."""

    name = "gemini"

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["subscriptions"] if message["type"] == "subscribe" else []
        return [symbol for item in asked if item["name"] == "l2" for symbol in item["symbols"]]

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        return [
            f'{{"type":"l2_updates","symbol":"{symbol}","changes":[["buy","1.00","1"],["sell","900000.00","1"]]}}'
            for symbol in symbols
        ]

    def _item(self, native: str, event: str, trade: tuple[str, str, str, int, int]) -> str:
        price, size, side, number, ts = trade
        return (
            f'{{"type":"trade","symbol":"{native}","{event}":{number + 7},"timestamp":{ts // 1_000_000},'
            f'"price":"{price}","quantity":"{size}","side":"{side}","tid":{number}}}'
        )

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return [self._item(native, "event_id", trade) for trade in trades]

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = ",".join(self._item(native, "eventid", trade) for trade in reversed(trades[-50:]))
        changes = '[["buy","9122.04","0.00121425"],["sell","9122.07","0.98942292"]]'
        return [
            f'{{"type":"l2_updates","symbol":"{native}","changes":{changes},"trades":[{items}],"auction_events":[]}}'
        ]

    def heartbeat(self) -> list[str]:
        return [f'{{"type":"heartbeat","timestamp":{int(self._clock() * 1000)}}}']

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"result": "error", "reason": "InvalidJson", "message": text})]


class Gateio(Wire):
    """Spot WebSocket v4: "Public Trades Channel", "Application ping pong", "Error"."""

    name = "gateio"

    def _head(self, channel: str, event: str) -> dict[str, Any]:
        now = self._clock()
        return {"time": int(now), "time_ms": int(now * 1000), "channel": channel, "event": event}

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["channel"] == "spot.trades" and message["event"] == "subscribe"
        return list(message["payload"]) if asked else []

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        answer = self._head("spot.trades", "subscribe")
        return [_json(answer | {"conn_id": "5e74253e9c793974", "error": None, "result": {"status": "success"}})]

    def _answer(self, message: str | bytes) -> list[str]:
        if b'"spot.ping"' in (message if isinstance(message, bytes) else message.encode()):
            return [_json(self._head("spot.pong", "") | {"error": None, "result": None})]
        return self.error("unknown request")

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        now = self._clock()
        head = f'{{"time":{int(now)},"time_ms":{int(now * 1000)},"channel":"spot.trades","event":"update","result":'
        return [
            f'{head}{{"id":{number},"id_market":{number},"create_time":{ts // SECOND},'
            f'"create_time_ms":"{ts // 1_000_000}.{ts // 100 % 10_000:04d}","side":"{side}",'
            f'"currency_pair":"{native}","amount":"{size}","price":"{price}","range":"{number}-{number}"}}}}'
            for price, size, side, number, ts in trades
        ]

    def error(self, text: str = "something went wrong") -> list[str]:
        answer = self._head("spot.trades", "subscribe")
        return [_json(answer | {"error": {"code": 2, "message": text}, "result": None})]


class Bitget(Wire):
    """API v2: "Websocket API" (ping, errors), Spot "Trading Channel"; the newest trade of a frame comes first."""

    name, per_frame = "bitget", 100

    def _symbols_of(self, message: Any) -> list[Any]:
        asked = message["args"] if message["op"] == "subscribe" else []
        return [item["instId"] for item in asked if item["channel"] == "trade" and item["instType"] == "SPOT"]

    def _arg(self, native: str) -> str:
        return f'"arg":{{"instType":"SPOT","channel":"trade","instId":"{native}"}}'

    def _acks(self, message: Any, symbols: list[str]) -> list[str]:
        return [f'{{"event":"subscribe",{self._arg(symbol)}}}' for symbol in symbols]

    def _answer(self, message: str | bytes) -> list[str]:
        return ["pong"] if message in ("ping", b"ping") else self.error("Invalid request")

    def _frames(self, action: str, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        items = [
            f'{{"ts":"{ts // 1_000_000}","price":"{price}","size":"{size}","side":"{side}","tradeId":"{number}"}}'
            for price, size, side, number, ts in reversed(trades)
        ]
        now = int(self._clock() * 1000)
        head = f'{{"action":"{action}",{self._arg(native)},"data":['
        return [f'{head}{",".join(items)}],"ts":{now}}}'] if items else []

    def trades(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("update", native, trades)

    def snapshot(self, native: str, trades: Sequence[tuple[str, str, str, int, int]]) -> list[str]:
        return self._frames("snapshot", native, trades[-50:])

    def error(self, text: str = "something went wrong") -> list[str]:
        return [_json({"event": "error", "code": "30001", "msg": text})]


WIRES: dict[str, type[Wire]] = {
    kind.name: kind for kind in (Binance, Coinbase, Kraken, Bitstamp, Okx, Bybit, Bitfinex, Gemini, Gateio, Bitget)
}
