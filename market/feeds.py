"""Twelve exchanges' WebSocket feeds of trades: a small adapter for each.

What all have in common, and what is promised of a trade, is in `market.adapter` and `market.trade`.

Each class states how its exchange tells the taker's side, the one convention of `Trade.side`, and where that is
written: in quotation marks, the exchange's own words; without, what its documentation or other readers of it take it
for. It says too whether its frames or ids are numbered without holes, so that `SequenceCheck` can see a gap.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self
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
    milliseconds,
    parse_iso_time,
    sequence_number,
    short,
    unknown,
)

_SNAPSHOT = {"update": "", "snapshot": "snapshot"}


def _error(text: object) -> Parsed:
    return Parsed([], "error", short(text))


def _status(text: object, reconnect: bool = False) -> Parsed:
    return Parsed([], "status", short(text), reconnect=reconnect)


class Binance(Adapter):
    """Binance spot, raw trade streams: one trade a frame, also wrapped as {"stream", "data"}.

    Taker: "m" says "Is the buyer the market maker?" (Web Socket Streams, "Trade Streams"), so true: the taker sold.
    Sequence: the trade id "t", which counts up by one per symbol. Pings are the protocol's, every 20 s; the server
    closes after 24 hours, with an event "serverShutdown" before. It disconnects whoever sends more than five messages
    in a second, pongs among them, and takes 1,024 streams per connection ("Websocket Limits").
    """

    name, url, dollar = "binance", "wss://stream.binance.com:9443/ws", "USDT"
    max_symbols, pace = 1024, 0.3
    fields, numbered = ("s", "p", "q", "m", "t", "T"), True
    sides: ClassVar = {True: "sell", False: "buy"}

    def _subscriptions(self, natives: list[str]) -> list[object]:
        streams = [f"{native.lower()}@trade" for native in natives]
        parts = [streams[at : at + 100] for at in range(0, len(streams), 100)]
        return [{"method": "SUBSCRIBE", "params": part, "id": at + 1} for at, part in enumerate(parts)]

    def _message(self, message: Any, received: int) -> Parsed:
        if "stream" in message:
            message = message["data"]
        event = message.get("e")
        if event == "trade":
            if type(message["m"]) is not bool:  # 1 equals True
                raise BadFrame(f"m is neither true nor false: {short(message['m'])}")
            return Parsed([self._item(message, received)], "trades")
        if event == "serverShutdown":
            return _status("server shutdown", reconnect=True)
        if event is not None:
            raise unknown(event)
        if "result" in message:
            return ACK
        error = message.get("error", message)
        return _error(f"{error['code']} {error['msg']}")


class Coinbase(Adapter):
    """Coinbase Exchange, channel "matches", with "heartbeat" for quiet markets.

    Taker: the opposite of "side", which "indicates the maker order side. If the side is sell this indicates the maker
    was a sell order and the match is considered an up-tick" (Exchange WebSocket Channels, "Match").
    Sequence: the trade id, which counts up by one per product ("sequence" counts the other channels' messages too).
    The first message of a product is its "last_match": a snapshot.
    """

    name, url, silent_after = "coinbase", "wss://ws-feed.exchange.coinbase.com", 10.0
    separator = "-"
    controls: ClassVar = {"heartbeat": HEARTBEAT, "subscriptions": ACK, "status": Parsed([], "status")}
    fields, numbered = ("product_id", "price", "size", "side", "trade_id", "time"), True
    sides: ClassVar = {"buy": "sell", "sell": "buy"}
    moment = staticmethod(parse_iso_time)

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "product_ids": natives, "channels": ["matches", "heartbeat"]}]

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message["type"]
        if kind == "match" or kind == "last_match":
            return Parsed([self._item(message, received, "" if kind == "match" else "snapshot")], "trades")
        if kind == "error":
            return _error(f"{message['message']}: {message.get('reason', '')}")
        return self._control(kind)


class Kraken(Adapter):
    """Kraken spot, WebSocket v2, channel "trade" (symbols are BTC/USD there, not XBT/USD).

    Taker: "side", "Taker order direction" (WebSocket API v2, "Trade").
    Sequence: "trade_id", "Sequence number unique per trading book". A snapshot of the last 50 trades comes first.
    Heartbeats come every second when nothing else does.
    """

    name, url, silent_after = "kraken", "wss://ws.kraken.com/v2", 10.0
    separator, acknowledged = "/", "symbols"
    controls: ClassVar = {"pong": HEARTBEAT, "subscribe": ACK}
    fields, numbered = ("symbol", "price", "qty", "side", "trade_id", "timestamp"), True
    moment = staticmethod(parse_iso_time)

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"method": "subscribe", "params": {"channel": "trade", "symbol": natives, "snapshot": True}}]

    def _message(self, message: Any, received: int) -> Parsed:
        channel = message.get("channel")
        if channel == "trade":
            return self._trades(message, message["data"], received, _SNAPSHOT[message["type"]])
        if channel == "heartbeat":
            return HEARTBEAT
        if channel == "status":
            system = message["data"][0]["system"]
            return _status("" if system == "online" else f"system: {system}")
        if channel is not None:
            raise unknown(channel)
        if message.get("success") is False or "error" in message:
            return _error(message["error"])
        return self._control(message.get("method"))


class Bitstamp(Adapter):
    """Bitstamp, channels "live_trades_…": one trade a frame.

    Taker: "type" is the "Trade type (0 - buy; 1 - sell)" (Websocket API v2, "Live ticker"). Whose is not said;
    other readers take it for the taker's, and so is it here. No sequence; ids grow but not by one. The exchange
    announces its maintenance by "bts:request_reconnect". Prices are taken from "price_str", which is exact.
    """

    name, url, ping_every, silent_after = "bitstamp", "wss://ws.bitstamp.net", 30.0, 75.0
    ping_text = '{"event":"bts:heartbeat"}'
    controls: ClassVar = {
        "bts:heartbeat": HEARTBEAT,
        "bts:subscription_succeeded": ACK,
        "bts:unsubscription_succeeded": ACK,
        "bts:request_reconnect": _status("the exchange asks for a new connection", reconnect=True),
    }
    fields = ("channel", ("price_str", "price"), ("amount_str", "amount"), "type", "id", "microtimestamp")
    sides: ClassVar = {0: "buy", 1: "sell"}
    _prefix = "live_trades_"

    @staticmethod
    def moment(value: object) -> int:
        """Nanoseconds from text or a number of microseconds."""
        return sequence_number(value) * 1000

    def _join(self, base: str, currency: str) -> str:
        return (base + currency).lower()

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"event": "bts:subscribe", "data": {"channel": self._prefix + native}} for native in natives]

    def _message(self, message: Any, received: int) -> Parsed:
        event = message["event"]
        if event == "trade":
            channel, data = message["channel"], message["data"]
            if not channel.startswith(self._prefix) or type(data["type"]) is not int:
                raise BadFrame(f"channel {short(channel)}, type {short(data['type'])}")
            data["channel"] = channel[len(self._prefix) :]
            return Parsed([self._item(data, received)], "trades")
        if event == "bts:error":
            return _error(message["data"]["message"])
        return self._control(event)


class Okx(Adapter):
    """OKX v5, public channel "trades": fills of one taker order at one price come as one trade.

    Taker: "side" is the side of the taker's order (API v5, Order Book Trading, "WS / Trades channel"). No sequence:
    "tradeId" is the last of "count" ids, and "seqId" is shared with the books. The client must send "ping" as text
    within 30 s of silence. Notice 64008: the connection closes soon for an upgrade.
    """

    name, url, dollar = "okx", "wss://ws.okx.com:8443/ws/v5/public", "USDT"
    separator, acknowledged = "-", "symbols"
    ping_text, ping_every, silent_after = "ping", 25.0, 60.0
    heartbeats = frozenset(("pong", b"pong"))
    controls: ClassVar = {"subscribe": ACK, "channel-conn-count": IGNORED, "channel-conn-count-error": IGNORED}
    fields = ("instId", "px", "sz", "side", "tradeId", "ts")

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"op": "subscribe", "args": [{"channel": "trades", "instId": native} for native in natives]}]

    def _message(self, message: Any, received: int) -> Parsed:
        event = message.get("event")
        if event is None:
            if message["arg"]["channel"] != "trades":
                raise unknown(message["arg"]["channel"])
            return self._trades(message, message["data"], received)
        if event == "error":
            return _error(f"{message['code']} {message['msg']}")
        if event == "notice":
            return _status(message["msg"], reconnect=message["code"] == "64008")
        return self._control(event)


class Bitget(Adapter):
    """Bitget v2 spot, public channel "trade"; a snapshot of past trades comes first.

    Taker: "side", "Transaction direction" (Spot, WebSocket, "Trading Channel"); whose is not said, other readers take
    it for the taker's. No sequence; ids grow but not by one. The newest trade of a frame comes first. The symbol is
    the subscription's. The client sends "ping" as text every 30 s ("Websocket API", which also says: 1,000 channels
    of a connection at most, 10 messages in a second).
    """

    name, url, dollar, acknowledged = "bitget", "wss://ws.bitget.com/v2/ws/public", "USDT", "symbols"
    ping_text, ping_every, silent_after = "ping", 25.0, 60.0
    heartbeats = frozenset(("pong", b"pong"))
    controls: ClassVar = {"subscribe": ACK}
    fields, newest_first = ("instId", "price", "size", "side", "tradeId", "ts"), True

    def _subscriptions(self, natives: list[str]) -> list[object]:
        args = [{"instType": "SPOT", "channel": "trade", "instId": native} for native in natives]
        return [{"op": "subscribe", "args": args[at : at + 50]} for at in range(0, len(args), 50)]

    def _message(self, message: Any, received: int) -> Parsed:
        event = message.get("event")
        if event is None:
            flags, arg = _SNAPSHOT[message["action"]], message["arg"]
            if arg["channel"] != "trade":
                raise unknown(arg["channel"])
            symbol = {"instId": arg["instId"]}
            return self._trades(
                message, message["data"], received, flags, lambda item, *more: self._item(item | symbol, *more)
            )
        if event == "error":
            return _error(f"{message['code']} {message['msg']}")
        return self._control(event)


class Bybit(Adapter):
    """Bybit v5 spot, topics "publicTrade.…": up to 1,024 trades a frame.

    Taker: "S" is "Side of taker. Buy,Sell" (v5, WebSocket Stream, "Trade"). "type" says "snapshot" for live trades too:
    there is no snapshot. No sequence: "seq" is a cross sequence with holes. The client pings every 20 s.
    """

    name, url, dollar = "bybit", "wss://stream.bybit.com/v5/public/spot", "USDT"
    ping_text, ping_every, silent_after = '{"op":"ping"}', 20.0, 60.0
    fields, sides = ("s", "p", "v", "S", "i", "T"), {"Buy": "buy", "Sell": "sell"}

    def _subscriptions(self, natives: list[str]) -> list[object]:
        topics = [f"publicTrade.{native}" for native in natives]  # at most ten in one request
        return [{"op": "subscribe", "args": topics[at : at + 10]} for at in range(0, len(topics), 10)]

    def _message(self, message: Any, received: int) -> Parsed:
        topic = message.get("topic")
        if topic is not None:
            if not topic.startswith("publicTrade."):
                raise unknown(topic)
            return self._trades(message, message["data"], received)
        op = message["op"]
        if op == "pong" or message.get("ret_msg") == "pong":
            return HEARTBEAT
        if message["success"] is False:
            return _error(message["ret_msg"])
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

    name, url, silent_after, max_symbols = "bitfinex", "wss://api-pub.bitfinex.com/ws/2", 40.0, 25
    controls: ClassVar = {"conf": ACK, "unsubscribed": ACK, "pong": HEARTBEAT}
    newest_first = True
    _names: ClassVar = {"USDT": "UST", "USDC": "UDC"}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._channels: dict[str, str] = {}  # symbols by the channel's number, as JSON has keys

    def context(self) -> str:
        """As that of any adapter, with the channels' symbols."""
        return orjson.dumps({"asked": self._asked, "channels": self._channels}).decode()

    def within(self, context: str | bytes) -> Self:
        """As that of any adapter, with the channels' symbols."""
        other, channels = super().within(context), orjson.loads(context).get("channels")
        if type(channels) is not dict or not all(each.isdigit() and type(channels[each]) is str for each in channels):
            raise ValueError(f"not a context: {short(context)}")
        other._channels = channels
        return other

    def _join(self, base: str, currency: str) -> str:
        base, currency = self._names.get(base, base), self._names.get(currency, currency)
        return f"t{base}:{currency}" if len(base) > 3 or len(currency) > 3 else f"t{base}{currency}"

    def _subscriptions(self, natives: list[str]) -> list[object]:
        self._channels = {}
        asked = [{"event": "subscribe", "channel": "trades", "symbol": native} for native in natives]
        return [{"event": "conf", "flags": 65536}, *asked]

    def _message(self, message: Any, received: int) -> Parsed:
        if type(message) is dict:
            return self._event(message)
        channel, body = message[:2]
        symbol = self._channels.get(str(channel))
        if type(channel) is not int or symbol is None:
            raise BadFrame(f"a channel without a symbol: {short(channel)}")
        at = 3 if body == "te" or body == "tu" else 2
        sequence = sequence_number(message[at]) if len(message) > at else None
        if body == "te":
            return Parsed([self._item(message[2], received, "", symbol)], "trades", sequence=sequence)
        if body == "hb" or body == "tu":
            return Parsed([], "heartbeat" if body == "hb" else "ignored", sequence=sequence)
        if type(body) is not list:
            raise unknown(body)
        found = self._trades(message, body, received, "snapshot", partial(self._item, symbol=symbol))
        return found._replace(sequence=sequence)

    def _item(self, item: Any, received: int, flags: str = "", symbol: str = "") -> Trade:
        number, when, amount, price = item
        if type(amount) is not float and type(amount) is not int:
            raise BadFrame(f"{type(amount).__name__} instead of an amount")
        side: Side = "buy" if amount > 0 else "sell"
        number, when = identity(number), milliseconds(when)
        return self._trade(symbol, price, abs(amount), side, number, when, received, None, flags)

    def _event(self, message: dict[str, Any]) -> Parsed:
        event = message["event"]
        if event == "subscribed":
            if message["channel"] != "trades" or type(message["chanId"]) is not int or len(self._channels) >= 1000:
                raise BadFrame(f"subscribed to {short(message)}")
            self._channels[str(message["chanId"])] = self.symbol(message["symbol"])
            return ACK
        if event == "info":
            code = message.get("code")
            if code is None:
                return _status("" if message["platform"]["status"] == 1 else "maintenance")
            return _status(f"{code} {message.get('msg', '')}", reconnect=code in (20051, 20061))
        if event == "error":
            return _error(f"{message['code']} {message['msg']}")
        return self._control(event)


class Gemini(Adapter):
    """Gemini, market data v2, "l2": the book's changes (ignored), the trades, and the last 50 trades at the beginning.

    Taker: "side", "Side of the taker in the trade. buy or sell" (Market Data v2, "Level 2 Data", "Trade Response").
    No sequence: ids grow, but over all symbols. The id is "tid"; where that is missing, as in live trades of 2026,
    "event_id", or "eventid" as the snapshot has it.
    """

    name, url, silent_after = "gemini", "wss://api.gemini.com/v2/marketdata", 30.0
    acknowledged = 0
    controls: ClassVar = {"heartbeat": HEARTBEAT, "subscription_ack": ACK} | dict.fromkeys(
        ("auction_open", "auction_indicative", "auction_result", "block_trade"), IGNORED
    )
    fields = ("symbol", "price", "quantity", "side", ("tid", "event_id", "eventid"), "timestamp")
    newest_first = True

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "subscriptions": [{"name": "l2", "symbols": natives}]}]

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message.get("type")
        if kind == "trade":
            return Parsed([self._item(message, received)], "trades")
        if kind == "l2_updates":
            if "trades" in message:
                return self._trades(message, message["trades"], received, "snapshot")
            expect_list(message["changes"])
            return IGNORED
        if kind is None and message["result"] == "error":
            return _error(f"{message['reason']} {message.get('message', '')}")
        return self._control(kind)


class Gateio(Adapter):
    """Gate.io v4 spot, channel "spot.trades": one trade a frame.

    Taker: "side" is the taker's (Spot WebSocket v4, "Public Trades Channel"). No sequence: "id" counts over all
    markets. The time is "create_time_ms": text, in milliseconds with a fraction.
    """

    name, url, dollar, separator = "gateio", "wss://api.gateio.ws/ws/v4/", "USDT", "_"
    ping_every, silent_after = 15.0, 45.0
    fields = ("currency_pair", "price", "amount", "side", "id", "create_time_ms")

    def _subscriptions(self, natives: list[str]) -> list[object]:
        now = int(self._clock())
        return [{"time": now, "channel": "spot.trades", "event": "subscribe", "payload": natives}]

    def ping(self) -> str:
        """A ping as the exchange wants it: with the time, in Unix seconds."""
        return f'{{"time":{int(self._clock())},"channel":"spot.ping"}}'

    def _message(self, message: Any, received: int) -> Parsed:
        channel, event = message["channel"], message.get("event")
        if channel == "spot.trades" and event == "update":
            return Parsed([self._item(message["result"], received)], "trades")
        error = message.get("error")
        if error is not None:
            return _error(f"{error['code']} {error['message']}")
        if channel == "spot.pong":
            return HEARTBEAT
        if channel == "spot.trades" and event in ("subscribe", "unsubscribe"):
            return ACK
        raise unknown(channel)


class _Stocks(Adapter):
    """US stocks: a symbol is a ticker, in USD."""

    moment = staticmethod(parse_iso_time)

    def _join(self, base: str, currency: str) -> str:
        if currency != "USD":
            raise ValueError(f"US stocks are in USD, not {currency}")
        return base


class Alpaca(_Stocks):
    """Alpaca, US stocks (the IEX feed): arrays of messages. Symbols are tickers in USD: AAPL is AAPL-USD.

    Taker: not said ("tks" is, of its crypto feed). No sequence. An id is unique to a venue ("x"), so both make the id.
    Corrections and cancellations ("c", "x") are known and not applied: a trade once told stays told. Nothing comes
    while the markets are closed, so silence says little: four days. Keys: two variables, as Alpaca's clients name them.
    """

    name, url = "alpaca", "wss://stream.data.alpaca.markets/v2/iex"
    key_env, secret_env = "APCA_API_KEY_ID", "APCA_API_SECRET_KEY"
    silent_after = 4 * 86_400.0
    acknowledged = 3  # connected, authenticated, subscribed
    controls: ClassVar = {"success": ACK, "subscription": ACK} | dict.fromkeys("cxqbdulno", IGNORED)
    sides: ClassVar = {"B": "buy", "S": "sell", "": "", "-": ""}

    def _subscriptions(self, natives: list[str]) -> list[object]:
        key, secret = self._keys or ("", "")
        return [{"action": "auth", "key": key, "secret": secret}, {"action": "subscribe", "trades": natives}]

    def _pick(self, item: Any) -> tuple[Any, ...]:
        if item["T"] != "t":
            raise unknown(item["T"])
        number = f"{identity(item['x'])}-{identity(item['i'])}"
        return item["S"], item["p"], item["s"], item.get("tks", ""), number, item["t"]

    def _message(self, message: Any, received: int) -> Parsed:
        told, trades = list[Parsed](), list[Any]()  # trades, and what is no message at all
        for item in expect_list(message):
            kind = item.get("T") if type(item) is dict else None
            if kind == "error":
                told.append(_error(f"{item['code']} {item['msg']}"))
            elif kind == "s":
                told.append(_status(f"{item['S']}: {item['sm']}"))
            elif type(kind) is str and kind in self.controls:
                told.append(self.controls[kind])
            else:
                trades.append(item)
        first = max(told, key=lambda each: each.kind == "error", default=IGNORED)
        return self._trades(trades, trades, received)._replace(note=first.note) if trades else first


class Finnhub(_Stocks):
    """Finnhub, US stocks: up to some dozens of trades a frame. Symbols are tickers in USD: AAPL is AAPL-USD.

    Taker: not said. No ids, no sequence: repeated trades cannot be told from equal ones. A "ping" comes about every
    minute, and no answer is wanted. The key is part of the address: do not log it.
    """

    name, url, key_env, silent_after = "finnhub", "wss://ws.finnhub.io", "FINNHUB_API_KEY", 180.0
    acknowledged = 0
    controls: ClassVar = {"ping": HEARTBEAT}

    def connect_url(self, url: str | None = None) -> str:
        """Where to connect, with the key."""
        return f"{super().connect_url(url)}?token={quote(''.join(self._keys), safe='')}"

    def _subscriptions(self, natives: list[str]) -> list[object]:
        return [{"type": "subscribe", "symbol": native} for native in natives]

    def _item(self, item: Any, received: int, flags: str = "") -> Trade:
        when = milliseconds(item["t"])
        return self._trade(self.symbol(item["s"]), item["p"], item["v"], "", "", when, received, None, flags)

    def _message(self, message: Any, received: int) -> Parsed:
        kind = message["type"]
        if kind == "trade":
            return self._trades(message, message["data"], received)
        if kind == "error":
            return _error(message["msg"])
        return self._control(kind)


ADAPTERS: dict[str, Adapter] = {
    kind.name: kind()
    for kind in (
        *(Binance, Coinbase, Kraken, Bitstamp, Okx, Bybit),
        *(Bitfinex, Gemini, Gateio, Bitget, Alpaca, Finnhub),
    )
}
