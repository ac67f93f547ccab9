"""Twelve exchanges' WebSocket feeds of trades: a small adapter for each.

Theory
------
Each class says where its exchange is, how its trades are asked for, and what its frames mean; what all have in common,
and what is promised of a trade, is in `market.adapter` and `market.trade`. A further exchange is
one more class and its name in `ADAPTERS`.

Each states how its exchange tells the taker's side, the one convention of `Trade.side`, and where that is written: in
quotation marks, the exchange's own words; without, what its documentation or other readers of it take it for. It says
too whether its frames or ids are numbered without holes, so that `SequenceCheck` can see a gap. USD is USDT where an
exchange has no books in USD (`dollar`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import orjson

from market.adapter import ACK, HEARTBEAT, IGNORED, Adapter
from market.trade import (
    BadFrame,
    Parsed,
    Side,
    Trade,
    expect_list,
    identity,
    in_order,
    milliseconds,
    parse_iso_time,
    sequence_number,
    short,
    unknown,
)

_SIDES: dict[Any, Side] = {"buy": "buy", "sell": "sell"}
_CAPITAL_SIDES: dict[Any, Side] = {"Buy": "buy", "Sell": "sell"}
_BITMEX_SIDES: dict[Any, Side] = _CAPITAL_SIDES | {"": "", None: ""}


class Binance(Adapter):
    """Binance spot, raw trade streams: one trade a frame, also wrapped as {"stream", "data"}.

    Taker: "m" says "Is the buyer the market maker?" (Web Socket Streams, "Trade Streams"), so true: the taker sold.
    Sequence: the trade id "t", which counts up by one per symbol. Pings are the protocol's, every 20 s; the server
    closes after 24 hours, with an event "serverShutdown" before. It disconnects whoever sends more than five messages
    in a second, pongs among them, and takes 1,024 streams per connection ("Websocket Limits").
    """

    name, url, dollar = "binance", "wss://stream.binance.com:9443/ws", "USDT"
    most, pace = 1024, 0.3

    def _subscriptions(self, natives: list[str]) -> list[object]:
        streams = [f"{native.lower()}@trade" for native in natives]
        parts = [streams[at : at + 100] for at in range(0, len(streams), 100)]
        return [{"method": "SUBSCRIBE", "params": part, "id": at + 1} for at, part in enumerate(parts)]

    def _message(self, message: Any, received: int) -> Parsed:
        if "stream" in message:
            message = message["data"]
        event = message.get("e")
        if event == "trade":
            maker = message["m"]
            if maker is not True and maker is not False:
                raise BadFrame(f"m is neither true nor false: {short(maker)}")
            number = sequence_number(message["t"])
            side: Side = "sell" if maker else "buy"
            symbol, when = self.symbol(message["s"]), milliseconds(message["T"])
            price, size = message["p"], message["q"]
            return Parsed([self._trade(symbol, price, size, side, str(number), when, received, number)], "trades")
        if event == "serverShutdown":
            return Parsed([], "status", "server shutdown", reconnect=True)
        if event is not None:
            raise unknown(event)
        if "result" in message:
            return ACK
        error = message.get("error", message)
        return Parsed([], "error", short(f"{error['code']} {error['msg']}"))


class Coinbase(Adapter):
    """Coinbase Exchange, channel "matches", with "heartbeat" for quiet markets.

    Taker: the opposite of "side", which "indicates the maker order side. If the side is sell this indicates the maker
    was a sell order and the match is considered an up-tick" (Exchange WebSocket Channels, "Match").
    Sequence: the trade id, which counts up by one per product ("sequence" counts the other channels' messages too).
    The first message of a product is its "last_match": a snapshot.
    """

    name, url, silent_after = "coinbase", "wss://ws-feed.exchange.coinbase.com", 10.0
    _taker: dict[Any, Side] = {"buy": "sell", "sell": "buy"}  # noqa: RUF012

    def _join(self, base: str, currency: str) -> str:
        return f"{base}-{currency}"

    def _split(self, native: str) -> str:
        return native

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "product_ids": natives, "channels": ["matches", "heartbeat"]}]

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message["type"]
        if kind == "match" or kind == "last_match":
            number, side = sequence_number(message["trade_id"]), self._taker[message["side"]]
            symbol, when = self.symbol(message["product_id"]), parse_iso_time(message["time"])
            price, size, flags = message["price"], message["size"], "" if kind == "match" else "snapshot"
            trade = self._trade(symbol, price, size, side, str(number), when, received, number, flags)
            return Parsed([trade], "trades")
        if kind == "heartbeat":
            return HEARTBEAT
        if kind == "subscriptions":
            return ACK
        if kind == "error":
            return Parsed([], "error", short(f"{message['message']}: {message.get('reason', '')}"))
        if kind == "status":
            return Parsed([], "status")
        raise unknown(kind)


class Kraken(Adapter):
    """Kraken spot, WebSocket v2, channel "trade" (symbols are BTC/USD there, not XBT/USD).

    Taker: "side", "Taker order direction" (WebSocket API v2, "Trade").
    Sequence: "trade_id", "Sequence number unique per trading book". A snapshot of the last 50 trades comes first.
    Heartbeats come every second when nothing else does.
    """

    name, url, silent_after = "kraken", "wss://ws.kraken.com/v2", 10.0

    def _join(self, base: str, currency: str) -> str:
        return f"{base}/{currency}"

    def _split(self, native: str) -> str:
        return native.replace("/", "-")

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"method": "subscribe", "params": {"channel": "trade", "symbol": natives, "snapshot": True}}]

    def acks(self, messages: int, symbols: int) -> int:
        return symbols

    def _message(self, message: Any, received: int) -> Parsed:
        channel = message.get("channel")
        if channel == "trade":
            flags, trades, made, symbol = _KRAKEN_FLAGS[message["type"]], [], self._trade, self.symbol
            for item in expect_list(message["data"]):
                number, when = sequence_number(item["trade_id"]), parse_iso_time(item["timestamp"])
                side, name = _SIDES[item["side"]], symbol(item["symbol"])
                trades.append(made(name, item["price"], item["qty"], side, str(number), when, received, number, flags))
            return Parsed(in_order(trades) if flags else trades, "trades")
        if channel == "heartbeat":
            return HEARTBEAT
        if channel == "status":
            system = message["data"][0]["system"]
            return Parsed([], "status", "" if system == "online" else short(f"system: {system}"))
        method = message.get("method")
        if method == "pong":
            return HEARTBEAT
        if message.get("success") is False or "error" in message:
            return Parsed([], "error", short(message["error"]))
        if method == "subscribe":
            return ACK
        raise unknown(channel or method)


_KRAKEN_FLAGS = {"update": "", "snapshot": "snapshot"}


class Bitstamp(Adapter):
    """Bitstamp, channels "live_trades_…": one trade a frame.

    Taker: "type" is the "Trade type (0 - buy; 1 - sell)" (Websocket API v2, "Live ticker"). Whose is not said;
    other readers take it for the taker's, and so is it here. No sequence; ids grow but not by one. The exchange
    announces its maintenance by "bts:request_reconnect". Prices are taken from "price_str", which is exact.
    """

    name, url, ping_every, silent_after = "bitstamp", "wss://ws.bitstamp.net", 30.0, 75.0
    _taker: dict[Any, Side] = {0: "buy", 1: "sell"}  # noqa: RUF012
    _prefix = "live_trades_"

    def _join(self, base: str, currency: str) -> str:
        return (base + currency).lower()

    def _split(self, native: str) -> str:
        return super()._split(native.upper())

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"event": "bts:subscribe", "data": {"channel": self._prefix + native}} for native in natives]

    def ping(self) -> str:
        return '{"event":"bts:heartbeat"}'

    def _message(self, message: Any, received: int) -> Parsed:
        event = message["event"]
        if event == "trade":
            channel, data = message["channel"], message["data"]
            if not channel.startswith(self._prefix) or type(data["type"]) is not int:
                raise BadFrame(f"channel {short(channel)}, type {short(data['type'])}")
            side, symbol = self._taker[data["type"]], self.symbol(channel[len(self._prefix) :])
            price, size = data.get("price_str", data["price"]), data.get("amount_str", data["amount"])
            number, when = identity(data["id"]), sequence_number(data["microtimestamp"]) * 1000
            return Parsed([self._trade(symbol, price, size, side, number, when, received)], "trades")
        if event == "bts:heartbeat":
            return HEARTBEAT
        if event == "bts:subscription_succeeded" or event == "bts:unsubscription_succeeded":
            return ACK
        if event == "bts:request_reconnect":
            return Parsed([], "status", "the exchange asks for a new connection", reconnect=True)
        if event == "bts:error":
            return Parsed([], "error", short(message["data"]["message"]))
        raise unknown(event)


class Okx(Adapter):
    """OKX v5, public channel "trades": fills of one taker order at one price come as one trade.

    Taker: "side" is the side of the taker's order (API v5, Order Book Trading, "WS / Trades channel"). No sequence:
    "tradeId" is the last of "count" ids, and "seqId" is shared with the books. The client must send "ping" as text
    within 30 s of silence. Notice 64008: the connection closes soon for an upgrade.
    """

    name, url, dollar = "okx", "wss://ws.okx.com:8443/ws/v5/public", "USDT"
    ping_every, silent_after = 25.0, 60.0
    words = frozenset(("pong", b"pong"))

    def _join(self, base: str, currency: str) -> str:
        return f"{base}-{currency}"

    def _split(self, native: str) -> str:
        return native

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"op": "subscribe", "args": [{"channel": "trades", "instId": native} for native in natives]}]

    def ping(self) -> str:
        return "ping"

    def acks(self, messages: int, symbols: int) -> int:
        return symbols

    def _message(self, message: Any, received: int) -> Parsed:
        event = message.get("event")
        if event is None:
            if message["arg"]["channel"] != "trades":
                raise unknown(message["arg"]["channel"])
            trades, made, symbol = [], self._trade, self.symbol
            for item in expect_list(message["data"]):
                side, number, when = _SIDES[item["side"]], identity(item["tradeId"]), milliseconds(item["ts"])
                trades.append(made(symbol(item["instId"]), item["px"], item["sz"], side, number, when, received))
            return Parsed(trades, "trades")
        if event == "subscribe":
            return ACK
        if event == "error":
            return Parsed([], "error", short(f"{message['code']} {message['msg']}"))
        if event == "notice":
            return Parsed([], "status", short(message["msg"]), reconnect=message["code"] == "64008")
        if event == "channel-conn-count" or event == "channel-conn-count-error":
            return IGNORED
        raise unknown(event)


class Bybit(Adapter):
    """Bybit v5 spot, topics "publicTrade.…": up to 1,024 trades a frame.

    Taker: "S" is "Side of taker. Buy,Sell" (v5, WebSocket Stream, "Trade"). "type" says "snapshot" for live trades too:
    there is no snapshot. No sequence: "seq" is a cross sequence with holes. The client pings every 20 s.
    """

    name, url, dollar = "bybit", "wss://stream.bybit.com/v5/public/spot", "USDT"
    ping_every, silent_after = 20.0, 60.0

    def _subscriptions(self, natives: list[str]) -> list[object]:
        topics = [f"publicTrade.{native}" for native in natives]  # at most ten in one request
        return [{"op": "subscribe", "args": topics[at : at + 10]} for at in range(0, len(topics), 10)]

    def ping(self) -> str:
        return '{"op":"ping"}'

    def _message(self, message: Any, received: int) -> Parsed:
        topic = message.get("topic")
        if topic is not None:
            if not topic.startswith("publicTrade."):
                raise unknown(topic)
            trades, made, symbol, sides = [], self._trade, self.symbol, _CAPITAL_SIDES
            for item in expect_list(message["data"]):
                side, number, when = sides[item["S"]], identity(item["i"]), milliseconds(item["T"])
                trades.append(made(symbol(item["s"]), item["p"], item["v"], side, number, when, received))
            return Parsed(trades, "trades")
        op = message["op"]
        if op == "pong" or message.get("ret_msg") == "pong":
            return HEARTBEAT
        if message["success"] is False:
            return Parsed([], "error", short(message["ret_msg"]))
        if op == "subscribe" and message["success"] is True:
            return ACK
        raise unknown(op)


class Bitfinex(Adapter):
    """Bitfinex v2, channels "trades": arrays under a channel's number, which an acknowledgement gave to a symbol.

    Taker: the sign of AMOUNT, "How much was bought (positive) or sold (negative). The order that causes the trade
    determines if it is a buy or a sell" (WebSocket, public "Trades"; the second sentence is in that of v1).
    "te" comes at once and "tu", the same trade again, a little later; "te" is taken, "tu" ignored. Sequence: asked for
    (flag 65536, SEQ_ALL), it ends every frame and counts over the connection, so it is the frame's and not the
    trade's. A snapshot, newest first, comes at the beginning. Events 20051, 20060, 20061: restart, maintenance begins,
    ends. The symbols for USDT and USDC are UST and UDC. "You can subscribe to 25 channels at the same time on the same
    connection" (Public Channels).
    """

    name, url, silent_after, most = "bitfinex", "wss://api-pub.bitfinex.com/ws/2", 40.0, 25
    _names: dict[str, str] = {"USDT": "UST", "USDC": "UDC"}  # noqa: RUF012
    _ours: dict[str, str] = {"UST": "USDT", "UDC": "USDC"}  # noqa: RUF012

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock=clock)
        self._channels: dict[int, str] = {}

    def context(self) -> str:
        channels = {str(channel): symbol for channel, symbol in self._channels.items()}
        return orjson.dumps({"asked": self._asked, "channels": channels}).decode()

    def within(self, context: str | bytes) -> Self:
        other = super().within(context)
        channels = orjson.loads(context).get("channels")
        if type(channels) is not dict or not all(type(symbol) is str for symbol in channels.values()):
            raise ValueError(f"not a context: {short(context)}")
        other._channels = {int(channel): symbol for channel, symbol in channels.items()}
        return other

    def _join(self, base: str, currency: str) -> str:
        base, currency = self._names.get(base, base), self._names.get(currency, currency)
        return f"t{base}:{currency}" if len(base) > 3 or len(currency) > 3 else f"t{base}{currency}"

    def _split(self, native: str) -> str:
        base, colon, currency = native[1:].partition(":")
        if not colon:
            base, currency = native[1:4], native[4:]
        if not native.startswith("t"):
            raise BadFrame(f"not a symbol: {short(native)}")
        return f"{self._ours.get(base, base)}-{self._ours.get(currency, currency)}"

    def _subscriptions(self, natives: list[str]) -> list[object]:
        self._channels = {}
        asked = [{"event": "subscribe", "channel": "trades", "symbol": native} for native in natives]
        return [{"event": "conf", "flags": 65536}, *asked]

    def _message(self, message: Any, received: int) -> Parsed:
        if type(message) is dict:
            return self._event(message)
        body = message[1]
        channel = message[0]
        if type(channel) is not int or channel not in self._channels:
            raise BadFrame(f"a channel without a symbol: {short(channel)}")
        if body == "te":
            symbol, sequence = self._channels[channel], sequence_number(message[3]) if len(message) > 3 else None
            return Parsed([self._item(symbol, message[2], received, "")], "trades", sequence=sequence)
        if body == "hb" or body == "tu":
            at = 2 if body == "hb" else 3
            sequence = sequence_number(message[at]) if len(message) > at else None
            return Parsed([], "heartbeat" if body == "hb" else "ignored", sequence=sequence)
        if type(body) is not list:
            raise unknown(body)
        symbol, sequence = self._channels[channel], sequence_number(message[2]) if len(message) > 2 else None
        trades = [self._item(symbol, item, received, "snapshot") for item in body]
        return Parsed(in_order(trades, newest_first=True), "trades", sequence=sequence)

    def _item(self, symbol: str, item: Any, received: int, flags: str) -> Trade:
        number, when, amount, price = item
        if type(amount) is not float and type(amount) is not int:
            raise BadFrame(f"{type(amount).__name__} instead of an amount")
        side: Side = "buy" if amount > 0 else "sell"
        return self._trade(
            symbol, price, abs(amount), side, identity(number), milliseconds(when), received, None, flags
        )

    def _event(self, message: dict[str, Any]) -> Parsed:
        event = message["event"]
        if event == "subscribed":
            if message["channel"] != "trades" or type(message["chanId"]) is not int or len(self._channels) >= 1000:
                raise BadFrame(f"subscribed to {short(message)}")
            self._channels[message["chanId"]] = self.symbol(message["symbol"])
            return ACK
        if event == "info":
            code = message.get("code")
            if code is None:
                return Parsed([], "status", "" if message["platform"]["status"] == 1 else "maintenance")
            return Parsed([], "status", short(f"{code} {message.get('msg', '')}"), reconnect=code in (20051, 20061))
        if event == "error":
            return Parsed([], "error", short(f"{message['code']} {message['msg']}"))
        if event == "conf" or event == "unsubscribed":
            return ACK
        if event == "pong":
            return HEARTBEAT
        raise unknown(event)


class Gemini(Adapter):
    """Gemini, market data v2, "l2": the book's changes (ignored), the trades, and the last 50 trades at the beginning.

    Taker: "side", "Side of the taker in the trade. buy or sell" (Market Data v2, "Level 2 Data", "Trade Response").
    No sequence: "tid" grows, but over all symbols.
    """

    name, url, silent_after = "gemini", "wss://api.gemini.com/v2/marketdata", 30.0

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "subscriptions": [{"name": "l2", "symbols": natives}]}]

    def _item(self, item: Any, received: int, flags: str) -> Trade:
        symbol, number, when = self.symbol(item["symbol"]), identity(item["tid"]), milliseconds(item["timestamp"])
        price, size, side = item["price"], item["quantity"], _SIDES[item["side"]]
        return self._trade(symbol, price, size, side, number, when, received, None, flags)

    def acks(self, messages: int, symbols: int) -> int:
        return 0

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message.get("type")
        if kind == "trade":
            return Parsed([self._item(message, received, "")], "trades")
        if kind == "l2_updates":
            if "trades" not in message:
                expect_list(message["changes"])
                return IGNORED
            trades = [self._item(item, received, "snapshot") for item in expect_list(message["trades"])]
            return Parsed(in_order(trades, newest_first=True), "trades")
        if kind == "heartbeat":
            return HEARTBEAT
        if kind == "subscription_ack":
            return ACK
        if kind is None and message["result"] == "error":
            return Parsed([], "error", short(f"{message['reason']} {message.get('message', '')}"))
        if kind == "auction_open" or kind == "auction_indicative" or kind == "auction_result" or kind == "block_trade":
            return IGNORED
        raise unknown(kind)


class Gateio(Adapter):
    """Gate.io v4 spot, channel "spot.trades": one trade a frame.

    Taker: "side" is the taker's (Spot WebSocket v4, "Public Trades Channel"). No sequence: "id" counts over all
    markets. The time is "create_time_ms": text, in milliseconds with a fraction.
    """

    name, url, dollar = "gateio", "wss://api.gateio.ws/ws/v4/", "USDT"
    ping_every, silent_after = 15.0, 45.0

    def _join(self, base: str, currency: str) -> str:
        return f"{base}_{currency}"

    def _split(self, native: str) -> str:
        return native.replace("_", "-")

    def _subscriptions(self, natives: list[str]) -> list[object]:
        now = int(self._clock())
        return [{"time": now, "channel": "spot.trades", "event": "subscribe", "payload": natives}]

    def ping(self) -> str:
        return f'{{"time":{int(self._clock())},"channel":"spot.ping"}}'

    def _message(self, message: Any, received: int) -> Parsed:
        channel, event = message["channel"], message.get("event")
        if channel == "spot.trades" and event == "update":
            item = message["result"]
            symbol, when = self.symbol(item["currency_pair"]), milliseconds(item["create_time_ms"])
            price, size, side, number = item["price"], item["amount"], _SIDES[item["side"]], identity(item["id"])
            return Parsed([self._trade(symbol, price, size, side, number, when, received)], "trades")
        error = message.get("error")
        if error is not None:
            return Parsed([], "error", short(f"{error['code']} {error['message']}"))
        if channel == "spot.pong":
            return HEARTBEAT
        if channel == "spot.trades" and event in ("subscribe", "unsubscribe"):
            return ACK
        raise unknown(channel)


class Bitmex(Adapter):
    """BitMEX, table "trade": perpetual contracts (XBTUSD, ETHUSD, XBTUSDT …), not spot.

    Taker: "side" is the aggressor's, as nautilus_trader reads it too; a trade without one (a settlement) is "".
    "size" counts contracts, which are USD for XBTUSD: "homeNotional", the amount of the base currency, is taken
    instead, and a trade without it is a bad frame. No sequence: "trdMatchID" is a UUID. "partial" is a snapshot. The
    client sends "ping" as text.
    """

    name, url, ping_every, silent_after = "bitmex", "wss://ws.bitmex.com/realtime", 10.0, 30.0
    words = frozenset(("pong", b"pong"))

    def _join(self, base: str, currency: str) -> str:
        return ("XBT" if base == "BTC" else base) + currency

    def _split(self, native: str) -> str:
        return super()._split("BTC" + native[3:] if native.startswith("XBT") else native)

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"op": "subscribe", "args": [f"trade:{native}" for native in natives]}]

    def ping(self) -> str:
        return "ping"

    def acks(self, messages: int, symbols: int) -> int:
        return symbols

    def _message(self, message: Any, received: int) -> Parsed:
        table = message.get("table")
        if table == "trade":
            action = message["action"]
            if action != "insert" and action != "partial":
                raise unknown(action)
            trades, made, symbol = [], self._trade, self.symbol
            flags = "" if action == "insert" else "snapshot"
            for item in expect_list(message["data"]):
                side, number, when = (
                    _BITMEX_SIDES[item.get("side")],
                    identity(item["trdMatchID"]),
                    parse_iso_time(item["timestamp"]),
                )
                name, price, size = symbol(item["symbol"]), item["price"], item["homeNotional"]
                trades.append(made(name, price, size, side, number, when, received, None, flags))
            return Parsed(in_order(trades) if flags else trades, "trades")
        if table is not None:
            raise unknown(table)
        if "error" in message:
            return Parsed([], "error", short(f"{message.get('status', '')} {message['error']}"))
        if "subscribe" in message:
            return ACK
        return Parsed([], "status", short(message["info"]))


class Alpaca(Adapter):
    """Alpaca, US stocks (the IEX feed): arrays of messages. Symbols are tickers in USD: AAPL is AAPL-USD.

    Taker: not said ("tks" is, of its crypto feed). No sequence. An id is unique to a venue ("x"), so both make the id.
    Corrections and cancellations ("c", "x") are known and not applied: a trade once told stays told. Nothing comes
    while the markets are closed, so silence says little: four days. Keys: two variables, as Alpaca's clients name them.
    """

    name, url = "alpaca", "wss://stream.data.alpaca.markets/v2/iex"
    key_env, secret_env = "APCA_API_KEY_ID", "APCA_API_SECRET_KEY"
    silent_after = 4 * 86_400.0
    _taker: dict[Any, Side] = {"B": "buy", "S": "sell", "": "", "-": ""}  # noqa: RUF012
    _known = frozenset(("c", "x", "q", "b", "d", "u", "l", "n", "o"))

    def __init__(self, *, clock: Callable[[], float] = time.time, key: str = "", secret: str = "") -> None:
        super().__init__(clock=clock)
        self._key, self._secret = key, secret

    def fresh(self) -> Self:
        return type(self)(clock=self._clock, key=self._key, secret=self._secret)

    def with_keys(self, environment: Mapping[str, str]) -> Self:
        key, secret = _variable(environment, self.key_env), _variable(environment, self.secret_env)
        return type(self)(clock=self._clock, key=key, secret=secret)

    def _join(self, base: str, currency: str) -> str:
        return _ticker(base, currency)

    def _split(self, native: str) -> str:
        return f"{native}-USD"

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [
            {"action": "auth", "key": self._key, "secret": self._secret},
            {"action": "subscribe", "trades": natives},
        ]

    def acks(self, messages: int, symbols: int) -> int:
        return 3  # connected, authenticated, subscribed

    def _message(self, message: Any, received: int) -> Parsed:
        trades: list[Trade] = []
        other: Parsed | None = None
        for item in expect_list(message):
            kind = item["T"]
            if kind == "t":
                number, when = f"{identity(item['x'])}-{identity(item['i'])}", parse_iso_time(item["t"])
                symbol, side = self.symbol(item["S"]), self._taker[item.get("tks", "")]
                trades.append(self._trade(symbol, item["p"], item["s"], side, number, when, received))
            elif kind == "error":
                other = Parsed([], "error", short(f"{item['code']} {item['msg']}"))
            elif kind == "success" or kind == "subscription":
                other = other or ACK
            elif kind == "s":
                other = other or Parsed([], "status", short(f"{item['S']}: {item['sm']}"))
            elif kind in self._known:
                other = other or IGNORED
            else:
                raise unknown(kind)
        if trades:
            return Parsed(trades, "trades", other.note if other else "")
        return other or IGNORED


class Finnhub(Adapter):
    """Finnhub, US stocks: up to some dozens of trades a frame. Symbols are tickers in USD: AAPL is AAPL-USD.

    Taker: not said. No ids, no sequence: repeated trades cannot be told from equal ones. A "ping" comes about every
    minute, and no answer is wanted. The key is part of the address: do not log it.
    """

    name, url, key_env, silent_after = "finnhub", "wss://ws.finnhub.io", "FINNHUB_API_KEY", 180.0

    def __init__(self, *, clock: Callable[[], float] = time.time, key: str = "") -> None:
        super().__init__(clock=clock)
        self._key = key

    def fresh(self) -> Self:
        return type(self)(clock=self._clock, key=self._key)

    def with_keys(self, environment: Mapping[str, str]) -> Self:
        return type(self)(clock=self._clock, key=_variable(environment, self.key_env))

    def connect_url(self, symbols: Sequence[str], url: str | None = None) -> str:
        return f"{url or self.url}?token={quote(self._key, safe='')}"

    def _join(self, base: str, currency: str) -> str:
        return _ticker(base, currency)

    def _split(self, native: str) -> str:
        return f"{native}-USD"

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "symbol": native} for native in natives]

    def acks(self, messages: int, symbols: int) -> int:
        return 0

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message["type"]
        if kind == "trade":
            made, symbol = self._trade, self.symbol
            trades = [
                made(symbol(item["s"]), item["p"], item["v"], "", "", milliseconds(item["t"]), received)
                for item in expect_list(message["data"])
            ]
            return Parsed(trades, "trades")
        if kind == "ping":
            return HEARTBEAT
        if kind == "error":
            return Parsed([], "error", short(message["msg"]))
        raise unknown(kind)


def _variable(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ValueError(f"the environment has no {name}")
    return environment[name]


def _ticker(base: str, currency: str) -> str:
    if currency != "USD":
        raise ValueError(f"US stocks are in USD, not {currency}")
    return base


ADAPTERS: dict[str, Adapter] = {
    kind.name: kind()
    for kind in (
        *(Binance, Coinbase, Kraken, Bitstamp, Okx, Bybit),
        *(Bitfinex, Gemini, Gateio, Bitmex, Alpaca, Finnhub),
    )
}
