"""Exchanges, adapters, sinks and brokers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import aiohttp
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from market import display as md
from market import flow as market_flow
from market import kafka as mk
from market import producer as producer_module
from market import topics as mt
from market.adapter import Adapter
from market.connect import Feed
from market.feed_socket import FeedTimes
from market.feeds import ADAPTERS
from market.flow import MarketProgram
from market.stats import ALL, Analytics, AnalyticsRow
from market.topics import DeadLetter, LetterKind, MarketEvent
from market.trade import Parsed, Trade
from market.workers import FIELDS
from primitives import CircuitBreaker
from runtime.monitor import Exporter
from runtime.spool import Spool
from sandbox.broker import Broker
from sandbox.exchanges import WIRES, Wire
from sandbox.markets import Exchanges
from tests.helpers.base import HANG_LIMIT, World, ticks, until_async

NOW = 1_790_000_000_000_000_000


def market_feeds_ns(text: str) -> int:
    """Nanoseconds, by another way than the one that is tested."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    seconds = int(datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC).timestamp())
    return seconds * 10**9 + int((fraction + "000000000")[:9])


@dataclasses.dataclass
class Case:
    """A frame as the exchange's documentation writes it, and what it means."""

    exchange: str
    frame: str
    kind: str = "trades"
    trades: tuple[tuple[Any, ...], ...] = ()  # symbol, price, size, side, id, time, sequence, flags
    note: str = ""
    reconnect: bool = False
    sequence: int | None = None
    before: tuple[str, ...] = ()  # frames of the same connection


def expected(what: str, at: int | str, sequence: int | None = None, flags: str = "") -> tuple[Any, ...]:
    """A trade: symbol, price, size, side, id ("-": none); ``at``: Unix time in ns, or text."""
    fields = ("" if each == "-" else each for each in what.split())
    return *fields, market_feeds_ns(at) if isinstance(at, str) else at, sequence, flags


BITFINEX_ACK = '{"event":"subscribed","channel":"trades","chanId":17470,"symbol":"tBTCUSD","pair":"BTCUSD"}'


CASES = [
    Case("binance", '{"result":null,"id":1}', "ack"),
    Case(
        "binance",
        '{"e":"trade","E":1672515782136,"s":"BNBBTC","t":12345,"p":"0.00100000","q":"100.00000000","T":1672515782136,'
        '"m":true,"M":true}',
        trades=(expected("BNB-BTC 0.00100000 100.00000000 sell 12345", 1672515782136000000, 12345),),
    ),
    Case(
        "binance",
        '{"stream":"bnbbtc@trade","data":{"e":"trade","E":1672515782136,"s":"BNBBTC","t":12346,"p":"0.001","q":"100",'
        '"T":1672515782137,"m":false,"M":true}}',
        trades=(expected("BNB-BTC 0.001 100 buy 12346", 1672515782137000000, 12346),),
    ),
    Case(
        "binance",
        '{"error":{"code":3,"msg":"Invalid JSON: expected value at line 1 column 1"},"id":null}',
        "error",
        note="3 Invalid JSON: expected value at line 1 column 1",
    ),
    Case(
        "binance",
        '{"code":2,"msg":"Invalid request: unknown variant"}',
        "error",
        note="2 Invalid request: unknown variant",
    ),
    Case("binance", '{"e":"serverShutdown","E":1770123456789}', "status", note="server shutdown", reconnect=True),
    Case(
        "coinbase",
        '{"type":"subscriptions","channels":[{"name":"matches","product_ids":["BTC-USD"],"account_ids":null},'
        '{"name":"heartbeat","product_ids":["BTC-USD"],"account_ids":null}]}',
        "ack",
    ),
    Case(
        "coinbase",
        '{"type":"heartbeat","sequence":90,"last_trade_id":20,"product_id":"BTC-USD","time":"2014-11-07T08:19:28.464459Z"}',
        "heartbeat",
    ),
    Case(
        "coinbase",
        '{"type":"last_match","trade_id":9,"maker_order_id":"ac928c66-ca53-498f-9c13-a110027a60e8","taker_order_id":'
        '"132fb6ae-456b-4654-b4e0-d681ac05cea1","side":"buy","size":"5","price":"400.20","product_id":"BTC-USD",'
        '"sequence":49,"time":"2014-11-07T08:19:26Z"}',
        trades=(expected("BTC-USD 400.20 5 sell 9", "2014-11-07T08:19:26Z", 9, "snapshot"),),
    ),
    Case(
        "coinbase",
        '{"type":"match","trade_id":10,"sequence":50,"maker_order_id":"ac928c66-ca53-498f-9c13-a110027a60e8",'
        '"taker_order_id":"132fb6ae-456b-4654-b4e0-d681ac05cea1","time":"2014-11-07T08:19:27.028459Z","product_id":'
        '"BTC-USD","size":"5.23512","price":"400.23","side":"sell"}',
        trades=(expected("BTC-USD 400.23 5.23512 buy 10", "2014-11-07T08:19:27.028459Z", 10),),
    ),
    Case(
        "coinbase",
        '{"type":"error","message":"Failed to subscribe","reason":"FOO-USD is not a valid product"}',
        "error",
        note="Failed to subscribe: FOO-USD is not a valid product",
    ),
    Case(
        "kraken",
        '{"channel":"status","data":[{"api_version":"v2","connection_id":13834774380200032777,"system":"online",'
        '"version":"2.0.0"}],"type":"update"}',
        "status",
    ),
    Case(
        "kraken",
        '{"channel":"status","data":[{"api_version":"v2","connection_id":13834774380200032777,"system":"maintenance",'
        '"version":"2.0.0"}],"type":"update"}',
        "status",
        note="system: maintenance",
    ),
    Case(
        "kraken",
        '{"method":"subscribe","result":{"channel":"trade","snapshot":true,"symbol":"MATIC/USD"},"success":true,'
        '"time_in":"2023-09-25T09:21:10.428340Z","time_out":"2023-09-25T09:21:10.428375Z"}',
        "ack",
    ),
    Case("kraken", '{"channel":"heartbeat"}', "heartbeat"),
    Case(
        "kraken",
        '{"method":"pong","req_id":101,"time_in":"2023-09-24T14:10:23.799685Z","time_out":"2023-09-24T14:10:23.799703Z"}',
        "heartbeat",
    ),
    Case(
        "kraken",
        '{"channel":"trade","type":"snapshot","data":[{"symbol":"MATIC/USD","side":"buy","price":0.5147,"qty":6423.46326,'
        '"ord_type":"limit","trade_id":4665846,"timestamp":"2023-09-25T07:48:36.925533Z"},{"symbol":"MATIC/USD","side":'
        '"buy","price":0.5147,"qty":1136.19677815,"ord_type":"limit","trade_id":4665847,"timestamp":'
        '"2023-09-25T07:49:36.925603Z"}]}',
        trades=(
            expected("MATIC-USD 0.5147 6423.46326 buy 4665846", "2023-09-25T07:48:36.925533Z", 4665846, "snapshot"),
            expected("MATIC-USD 0.5147 1136.19677815 buy 4665847", "2023-09-25T07:49:36.925603Z", 4665847, "snapshot"),
        ),
    ),
    Case(
        "kraken",
        '{"channel":"trade","type":"update","data":[{"symbol":"MATIC/USD","side":"sell","price":0.5117,"qty":40.0,'
        '"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}',
        trades=(expected("MATIC-USD 0.5117 40.0 sell 4665906", "2023-09-25T07:49:37.708706Z", 4665906),),
    ),
    Case(
        "kraken",
        '{"error":"Currency pair not supported FOO/USD","method":"subscribe","success":false,"symbol":"FOO/USD",'
        '"time_in":"2023-09-25T09:21:10.428340Z","time_out":"2023-09-25T09:21:10.428375Z"}',
        "error",
        note="Currency pair not supported FOO/USD",
    ),
    Case("bitstamp", '{"event":"bts:subscription_succeeded","channel":"live_trades_btcusd","data":{}}', "ack"),
    Case("bitstamp", '{"event":"bts:heartbeat","channel":"","data":{"status":"success"}}', "heartbeat"),
    Case(
        "bitstamp",
        '{"data":{"id":212337562,"timestamp":"1643643584","amount":0.0028,"amount_str":"0.00280000","price":38416,'
        '"price_str":"38416.00","type":0,"microtimestamp":"1643643584587000","buy_order_id":1453282316578816,'
        '"sell_order_id":1453282315493376},"channel":"live_trades_btcusd","event":"trade"}',
        trades=(expected("BTC-USD 38416.00 0.00280000 buy 212337562", 1643643584587000000),),
    ),
    Case(
        "bitstamp",
        '{"data":{"id":212337563,"timestamp":"1643643584","amount":0.0028,"price":38416.5,"type":1,"microtimestamp":'
        '"1643643584587001","buy_order_id":1,"sell_order_id":2},"channel":"live_trades_ethusdt","event":"trade"}',
        trades=(expected("ETH-USDT 38416.5 0.0028 sell 212337563", 1643643584587001000),),
    ),
    Case(
        "bitstamp",
        '{"event":"bts:error","channel":"","data":{"code":4009,"message":"Connection is unauthorized."}}',
        "error",
        note="Connection is unauthorized.",
    ),
    Case(
        "bitstamp",
        '{"event":"bts:request_reconnect","channel":"","data":""}',
        "status",
        note="the exchange asks for a new connection",
        reconnect=True,
    ),
    Case("okx", '{"event":"subscribe","arg":{"channel":"trades","instId":"BTC-USDT"},"connId":"a4d3ae55"}', "ack"),
    Case("okx", "pong", "heartbeat"),
    Case(
        "okx",
        '{"arg":{"channel":"trades","instId":"BTC-USDT"},"data":[{"instId":"BTC-USDT","tradeId":"130639474","px":"42219.9",'
        '"sz":"0.12060306","side":"buy","ts":"1630048897897","count":"3","source":"0","seqId":1234}]}',
        trades=(expected("BTC-USDT 42219.9 0.12060306 buy 130639474", 1630048897897000000),),
    ),
    Case(
        "okx",
        '{"arg":{"channel":"trades","instId":"BTC-USDT"},"data":[{"instId":"BTC-USDT","tradeId":"1","px":"1","sz":"2","side":'
        '"sell","ts":"1630048897897"},{"instId":"BTC-USDT","tradeId":"2","px":"3","sz":"4","side":"buy","ts":"1630048897898"}]}',
        trades=(
            expected("BTC-USDT 1 2 sell 1", 1630048897897000000),
            expected("BTC-USDT 3 4 buy 2", 1630048897898000000),
        ),
    ),
    Case(
        "okx",
        '{"event":"error","code":"60012","msg":"Invalid request","connId":"a4d3ae55"}',
        "error",
        note="60012 Invalid request",
    ),
    Case(
        "okx",
        '{"event":"notice","code":"64008","msg":"The connection will soon be closed for a service upgrade. Please '
        'reconnect.",'
        '"connId":"a4d3ae55"}',
        "status",
        note="The connection will soon be closed for a service upgrade. Please reconnect.",
        reconnect=True,
    ),
    Case("okx", '{"event":"channel-conn-count","channel":"trades","connCount":"1","connId":"abcd1234"}', "ignored"),
    Case("bybit", '{"success":true,"ret_msg":"subscribe","conn_id":"2324d924-aa4d","op":"subscribe"}', "ack"),
    Case("bybit", '{"success":true,"ret_msg":"pong","conn_id":"0970e817-426e","req_id":"","op":"ping"}', "heartbeat"),
    Case("bybit", '{"req_id":"test","op":"pong","args":["1675418560633"],"conn_id":"cfcb4ocs"}', "heartbeat"),
    Case(
        "bybit",
        '{"topic":"publicTrade.BTCUSDT","type":"snapshot","ts":1672304486868,"data":[{"T":1672304486865,"s":"BTCUSDT","S":'
        '"Buy","v":"0.001","p":"16578.50","L":"PlusTick","i":"20f43950-d8dd-5b31-9112-a178eb6023af","BT":false,"seq":'
        '1783284617},{"T":1672304486866,"s":"BTCUSDT","S":"Sell","v":"0.002","p":"16578.40","L":"MinusTick","i":'
        '"2290000000007764263","BT":false,"seq":1783284620}]}',
        trades=(
            expected("BTC-USDT 16578.50 0.001 buy 20f43950-d8dd-5b31-9112-a178eb6023af", 1672304486865000000),
            expected("BTC-USDT 16578.40 0.002 sell 2290000000007764263", 1672304486866000000),
        ),
    ),
    Case(
        "bybit",
        '{"success":false,"ret_msg":"error:handler not found,topic:publicTrade.FOO","conn_id":"7bf2","op":"subscribe"}',
        "error",
        note="error:handler not found,topic:publicTrade.FOO",
    ),
    Case("bitfinex", '{"event":"info","version":2,"serverId":"cfa1bd5b","platform":{"status":1}}', "status"),
    Case(
        "bitfinex",
        '{"event":"info","version":2,"serverId":"cfa1bd5b","platform":{"status":0}}',
        "status",
        note="maintenance",
    ),
    Case("bitfinex", '{"event":"conf","status":"OK","flags":65536}', "ack"),
    Case("bitfinex", BITFINEX_ACK, "ack"),
    Case(
        "bitfinex",
        "[17470,[[401597395,1574694478808,0.005,7245.3],[401597394,1574694478808,-0.5,7245.3],"
        "[401597393,1574694475039,1e-7,7244.9]],1]",
        trades=(
            expected("BTC-USD 7244.9 0.0000001 buy 401597393", 1574694475039000000, flags="snapshot"),
            expected("BTC-USD 7245.3 0.5 sell 401597394", 1574694478808000000, flags="snapshot"),
            expected("BTC-USD 7245.3 0.005 buy 401597395", 1574694478808000000, flags="snapshot"),
        ),
        sequence=1,
        before=(BITFINEX_ACK,),
    ),
    Case(
        "bitfinex",
        '[17470,"te",[401597396,1574694478809,-0.005,7245]]',
        trades=(expected("BTC-USD 7245 0.005 sell 401597396", 1574694478809000000),),
        before=(BITFINEX_ACK,),
    ),
    Case(
        "bitfinex",
        '[17470,"tu",[401597396,1574694478809,-0.005,7245],7]',
        "ignored",
        sequence=7,
        before=(BITFINEX_ACK,),
    ),
    Case("bitfinex", '[17470,"hb",8]', "heartbeat", sequence=8, before=(BITFINEX_ACK,)),
    Case("bitfinex", '{"event":"error","msg":"symbol: invalid","code":10300}', "error", note="10300 symbol: invalid"),
    Case(
        "bitfinex",
        '{"event":"info","code":20051,"msg":"Stopping. Please try to reconnect"}',
        "status",
        note="20051 Stopping. Please try to reconnect",
        reconnect=True,
    ),
    Case(
        "bitfinex",
        '{"event":"info","code":20060,"msg":"Entering in Maintenance mode."}',
        "status",
        note="20060 Entering in Maintenance mode.",
    ),
    Case(
        "gemini",
        '{"type":"l2_updates","symbol":"BTCUSD","changes":[["buy","9122.04","0.00121425"],["sell","9122.07","0.98942292"]],'
        '"trades":[{"type":"trade","symbol":"BTCUSD","eventid":169841459,"timestamp":1560976400429,"price":"9122.05",'
        '"quantity":"0.1","side":"buy","tid":169841459},{"type":"trade","symbol":"BTCUSD","eventid":169841458,"timestamp":'
        '1560976400428,"price":"9122.04","quantity":"0.0073173","side":"sell","tid":169841458}]}',
        trades=(
            expected("BTC-USD 9122.04 0.0073173 sell 169841458", 1560976400428000000, flags="snapshot"),
            expected("BTC-USD 9122.05 0.1 buy 169841459", 1560976400429000000, flags="snapshot"),
        ),
    ),
    Case("gemini", '{"type":"l2_updates","symbol":"BTCUSD","changes":[["sell","9160.20","0.1921229751"]]}', "ignored"),
    Case(
        "gemini",
        '{"type":"trade","symbol":"BTCUSD","event_id":3575573053,"timestamp":1512314110000,"price":"9004.21000000","quantity":'
        '"0.09110000","side":"buy","tid":2840140800042677}',
        trades=(expected("BTC-USD 9004.21000000 0.09110000 buy 2840140800042677", 1512314110000000000),),
    ),
    Case(
        "gemini",
        '{"type":"trade","symbol":"BTCUSD","event_id":122278173770,"timestamp":1789999999981,"price":"22530.80","quantity":'
        '"0.04","side":"buy"}',
        trades=(expected("BTC-USD 22530.80 0.04 buy 122278173770", 1789999999981000000),),
    ),
    Case(
        "gemini",
        '{"type":"l2_updates","symbol":"BTCUSD","changes":[],"trades":[{"type":"trade","symbol":"BTCUSD","eventid":169841459,'
        '"timestamp":1560976400429,"price":"9122.05","quantity":"0.1","side":"buy"}]}',
        trades=(expected("BTC-USD 9122.05 0.1 buy 169841459", 1560976400429000000, flags="snapshot"),),
    ),
    Case("gemini", '{"type":"heartbeat","timestamp":1512314110000}', "heartbeat"),
    Case("gemini", '{"result":"error","reason":"InvalidJson"}', "error", note="InvalidJson "),
    Case(
        "gateio",
        '{"time":1611541000,"time_ms":1611541000001,"channel":"spot.trades","event":"subscribe","error":null,"result":'
        '{"status":"success"}}',
        "ack",
    ),
    Case("gateio", '{"time":1545404023,"channel":"spot.pong","event":"","error":null,"result":null}', "heartbeat"),
    Case(
        "gateio",
        '{"time":1606292218,"time_ms":1606292218231,"channel":"spot.trades","event":"update","result":{"id":309143071,'
        '"create_time":1606292218,"create_time_ms":"1606292218213.4578","side":"sell","currency_pair":"GT_USDT","amount":'
        '"16.4700000000","price":"0.4705000000","range":"2390902-2390902"}}',
        trades=(expected("GT-USDT 0.4705000000 16.4700000000 sell 309143071", 1606292218213457800),),
    ),
    Case(
        "gateio",
        '{"time":1611541000,"channel":"spot.trades","event":"subscribe","error":{"code":2,"message":"unknown '
        'currency pair GT_USDTX"},"result":null}',
        "error",
        note="2 unknown currency pair GT_USDTX",
    ),
    Case("bitget", '{"event":"subscribe","arg":{"instType":"SPOT","channel":"trade","instId":"BTCUSDT"}}', "ack"),
    Case("bitget", "pong", "heartbeat"),
    Case(
        "bitget",
        '{"action":"snapshot","arg":{"instType":"SPOT","channel":"trade","instId":"BTCUSDT"},"data":[{"ts":"1695709835823",'
        '"price":"26293.5","size":"0.002","side":"sell","tradeId":"1000000001"},{"ts":"1695709835822","price":"26293.4",'
        '"size":"0.0013","side":"buy","tradeId":"1000000000"}],"ts":1695711090682}',
        trades=(
            expected("BTC-USDT 26293.4 0.0013 buy 1000000000", 1695709835822000000, flags="snapshot"),
            expected("BTC-USDT 26293.5 0.002 sell 1000000001", 1695709835823000000, flags="snapshot"),
        ),
    ),
    Case(
        "bitget",
        '{"action":"update","arg":{"instType":"SPOT","channel":"trade","instId":"BTCUSDT"},"data":[{"ts":"1695709835824",'
        '"price":"26293.6","size":"0.1","side":"buy","tradeId":"1000000003"},{"ts":"1695709835824","price":"26293.5",'
        '"size":"0.2","side":"buy","tradeId":"1000000002"}],"ts":1695711090683}',
        trades=(
            expected("BTC-USDT 26293.5 0.2 buy 1000000002", 1695709835824000000),
            expected("BTC-USDT 26293.6 0.1 buy 1000000003", 1695709835824000000),
        ),
    ),
    Case("bitget", '{"event":"error","code":"30001","msg":"instId is wrong"}', "error", note="30001 instId is wrong"),
    Case("alpaca", '[{"T":"success","msg":"connected"}]', "ack"),
    Case("alpaca", '[{"T":"success","msg":"authenticated"}]', "ack"),
    Case("alpaca", '[{"T":"subscription","trades":["AAPL"],"quotes":[],"bars":[]}]', "ack"),
    Case(
        "alpaca",
        '[{"T":"t","i":96921,"S":"AAPL","x":"D","p":126.55,"s":1,"t":"2021-02-22T15:51:44.208123456Z","c":["@","I"],"z":"C"},'
        '{"T":"t","i":96922,"S":"BRK.B","x":"V","p":240,"s":0.5,"t":"2021-02-22T15:51:44Z","c":["@"],"z":"A"}]',
        trades=(
            expected("AAPL-USD 126.55 1 - D-96921", "2021-02-22T15:51:44.208123456Z"),
            expected("BRK.B-USD 240 0.5 - V-96922", "2021-02-22T15:51:44Z"),
        ),
    ),
    Case(
        "alpaca",
        '[{"T":"error","code":406,"msg":"connection limit exceeded"}]',
        "error",
        note="406 connection limit exceeded",
    ),
    Case(
        "alpaca",
        '[{"T":"s","S":"AAPL","sc":"H","sm":"Trading Halt","rc":"T12","rm":"x","t":"2021-02-22T19:15:00Z","z":"C"}]',
        "status",
        note="AAPL: Trading Halt",
    ),
    Case("alpaca", '[{"T":"c","S":"EEM","x":"M","oi":52983525033527,"op":39.1582,"os":440000}]', "ignored"),
    Case("finnhub", '{"type":"ping"}', "heartbeat"),
    Case(
        "finnhub",
        '{"data":[{"c":["1","8"],"p":7296.89,"s":"AAPL","t":1575526691134,"v":0.011467},{"p":7297,"s":"AAPL","t":1575526691135,'
        '"v":3}],"type":"trade"}',
        trades=(
            expected("AAPL-USD 7296.89 0.011467 - -", 1575526691134000000),
            expected("AAPL-USD 7297 3 - -", 1575526691135000000),
        ),
    ),
    Case(
        "finnhub",
        '{"type":"error","msg":"Subscribing to too many symbols"}',
        "error",
        note="Subscribing to too many symbols",
    ),
]


def merged(name: str) -> Adapter:
    """One whose books in USDT stand in for USD."""
    return type(ADAPTERS[name])(merge_quotes=True)


def connected(name: str, symbols: list[str]) -> tuple[Wire, Adapter, list[Parsed]]:
    """A wire and an adapter after the subscription, and what the frames until then came to."""
    wire, adapter = WIRES[name](clock=lambda: NOW / 1e9), merged(name)
    frames, natives = wire.welcome(), []
    for message in adapter.subscribe(symbols):
        natives += wire.symbols_of(message)
        frames += wire.acks(message)
    assert natives == [adapter.native(symbol) for symbol in symbols]
    return wire, adapter, [adapter.parse(frame, NOW) for frame in frames]


SYMBOLS = ("BTC-USD", "ETH-USD")


NAMES = tuple(WIRES)


class Sink:
    """Takes what feeds tell."""

    def __init__(self) -> None:
        self.told: dict[str, list[Trade]] = {}
        self.letters: list[tuple[str, str, bytes, int]] = []
        self.events: list[MarketEvent] = []
        self.gate: asyncio.Event | None = None

    def emit(self, exchange: str, trades: list[Trade]) -> Awaitable[object] | None:
        self.told.setdefault(exchange, []).extend(trades)
        return None if self.gate is None or self.gate.is_set() else self.gate.wait()

    def dead(self, letter: DeadLetter) -> None:
        self.letters.append(letter[:4])

    def tell(self, event: MarketEvent) -> None:
        self.events.append(event)

    def live(self, exchange: str) -> list[Trade]:
        """Each trade once, without those of snapshots."""
        told = self.told.get(exchange, [])
        return [trade for trade in told if "snapshot" not in trade.flags and "duplicate" not in trade.flags]

    def ids(self, exchange: str) -> dict[str, list[str]]:
        """By the exchange's names."""
        found: dict[str, list[str]] = {}
        for trade in self.live(exchange):
            found.setdefault(ADAPTERS[exchange].native(trade.symbol), []).append(trade.trade_id)
        return found


def feed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A feed's options; the times among them as one."""
    times = {name: options[name] for name in FeedTimes.__dataclass_fields__ if name in options}
    return {name: each for name, each in options.items() if name not in times} | {"times": FeedTimes(**times)}


class MarketConnectWorld:
    """Exchanges, a feed for each, and what they told. `async with` it: all are live then; they are stopped after."""

    def __init__(
        self,
        them: Exchanges,
        names: Sequence[str] = NAMES,
        **options: Any,
    ) -> None:
        self.them, self.names, self.sink = them, names, Sink()
        self.own: dict[str, dict[str, Any]] = options.pop("own", {})  # options of single feeds
        self.options: dict[str, Any] = {"base": 0.02, "cap": 0.1, "breaker": None, **options}
        self.feeds: dict[str, Feed] = {}
        self.runs: list[asyncio.Task[None]] = []

    def feed(self, name: str, adapter: Adapter | None = None, **options: Any) -> Feed:
        breaker = CircuitBreaker(name, failures=None, reset=0.01, max_reset=0.01)  # never opens
        chosen = {"breaker": breaker, "session": self.session, **{k: v for k, v in self.options.items() if v}}
        options = feed_options({"url": self.them.urls[name], "symbols": SYMBOLS, **chosen, **options})
        adapter = adapter or merged(name)
        options = {"tell": self.sink.tell, **options}
        return Feed(adapter, options.pop("symbols"), self.sink.emit, self.sink.dead, **options)

    def begin(self, name: str, adapter: Adapter | None = None, **options: Any) -> Feed:
        """A feed that runs until the end."""
        feed = self.feeds[name] = self.feed(name, adapter, **options)
        self.runs.append(asyncio.create_task(feed.run()))
        return feed

    async def __aenter__(self) -> MarketConnectWorld:
        self.session = aiohttp.ClientSession()
        for name in self.names:
            self.begin(name, **self.own.get(name, {}))
        for name in self.names:
            await self.until(name, "live")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await asyncio.gather(*(feed.stop() for feed in self.feeds.values()))
        await asyncio.gather(*self.runs)
        await self.session.close()
        if kind is None:
            assert asyncio.all_tasks() == {asyncio.current_task()}
            await until_async(lambda: not any(each.open for each in self.them.stats().values()))

    async def until(self, name: str, state: str, connects: int = 1) -> None:
        def there() -> bool:
            found = self.feeds[name].stats()
            return found.state == state and found.connects >= connects

        await until_async(there)

    async def told(self, name: str, trades: int) -> None:
        """So many, of those that count as live, have been told."""
        await until_async(lambda: len(self.sink.live(name)) >= trades)

    async def settled(self, name: str) -> None:
        """Every trade that was sent has been told, or stands in a dead letter."""

        def there() -> bool:
            letters = sum(letter[0] == name and b'"tu"' not in letter[2] for letter in self.sink.letters)
            return len(self.sink.live(name)) + letters >= sum(self.them.sent(name).values())

        await until_async(there)


class FakeSocket:
    def __init__(self, world: World, lasts: float, frames: Sequence[bytes] = (b'{"result":null,"id":1}',)) -> None:
        self.world, self.lasts, self.frames, self.sent = world, lasts, deque(frames), list[str]()

    async def receive(self) -> aiohttp.WSMessage:
        if self.frames:
            return aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, self.frames.popleft(), "")
        self.world.now += self.lasts
        return aiohttp.WSMessage(aiohttp.WSMsgType.CLOSE, 1001, "")

    async def send_str(self, text: str) -> None:
        self.sent.append(text)

    async def send_frame(self, payload: bytes, opcode: int) -> None:
        self.sent.append(f"{opcode}")

    async def close(self, **_: object) -> bool:
        return True

    def exception(self) -> None:
        return None


STATS_T0 = 1_700_000_000_000_000_000


EXCHANGES = ("kraken", "okx", "binance")


def market_stats_trade(
    at: float, price: float = 100.0, size: float = 1.0, exchange: str = "kraken", symbol: str = "BTC-USD",
    trade_id: str = "", flags: str = "", received: float | None = None,
) -> Trade:  # fmt: skip
    """``at``, ``received``: seconds after T0; received as it happened if not given."""
    ts, got = (STATS_T0 + round(1e9 * seconds) for seconds in (at, at if received is None else received))
    return Trade(exchange, symbol, repr(price), repr(size), price, size, "", trade_id, ts, got, None, flags)


def market_kafka_letter(
    exchange: str, error: str, raw: bytes, ts_recv: int, kind: LetterKind = "binary", context: str = ""
) -> DeadLetter:
    return DeadLetter(exchange, error, raw, ts_recv, kind, context)


def market_stats_take(analytics: Analytics, trade: Trade) -> bool:
    """``take`` of a trade."""
    return analytics.take(*(getattr(trade, name) for name in FIELDS))


def market_stats_row(
    analytics: Analytics, symbol: str = "BTC-USD", exchange: str = ALL, now_ns: int = 0
) -> AnalyticsRow | None:
    """As of ``now_ns`` or the newest trade, whichever is later; None if there was no trade."""
    book = analytics._books.get(symbol)
    if book is None:
        return None
    if exchange == ALL:
        return analytics._all(symbol, book, now_ns)
    series = book.exchanges.get(exchange)
    return None if series is None else series.row(symbol, exchange, now_ns)


def market_stats_stream(seed: int, n: int = 3000, seconds: float = 90.0) -> list[Trade]:
    """Walks of two symbols on three exchanges, with holes; 5 % come late, 5 % twice, all in disorder."""
    rng = random.Random(seed)
    price, at, arrivals = {"BTC-USD": 60_000.0, "XRP-USD": 0.5}, 0.0, list[tuple[float, Trade]]()
    for n_th in range(n):
        at += rng.expovariate(n / seconds) if rng.random() > 0.002 else rng.choice((4.0, 25.0))
        symbol, exchange = rng.choice(sorted(price)), rng.choice(EXCHANGES)
        price[symbol] *= math.exp(rng.gauss(0, 1e-3))
        trade_id = str(n_th) if exchange != "okx" else ""
        trade = market_stats_trade(
            round(at, rng.choice((0, 2, 6))), price[symbol], 10 ** rng.uniform(-6, 3), exchange, symbol, trade_id
        )
        delay = rng.uniform(0, 1.9) if rng.random() > 0.05 else rng.uniform(2, 9)
        arrivals.append((at + delay, trade))
        if trade_id and rng.random() < 0.05:
            arrivals.append((at + delay + rng.uniform(0, 3), trade))
        if rng.random() < 0.01:
            arrivals.append((at, trade._replace(trade_id=trade_id + "x", flags="gap,duplicate")))
        if rng.random() < 0.01:
            arrivals.append((at, trade._replace(trade_id=trade_id + "y", ts_event=trade.ts_recv + 2 * 10**9 + 1)))
    return [trade for _, trade in sorted(arrivals, key=lambda each: each[0])]


MARKET_KAFKA_NOW = (time.time_ns() // 10**9 - 3600) * 10**9
"""Of late: brokers delete what is older than their retention."""


AT_ONCE = 0.02, 0.02


def market_kafka_trade(n: int, symbol: Any = "BTC-USD", **changes: Any) -> Trade:
    trade = Trade(
        *("kraken", symbol, f"{65000 + n}.10", "0.00150", 65000.1 + n, 0.0015, "buy", str(n)),
        *(MARKET_KAFKA_NOW + n * 1_000_000, MARKET_KAFKA_NOW + n * 1_000_000 + 5, n, ""),
    )
    return trade._replace(**changes)


def market_kafka_trades(first: int, last: int, symbols: int = 5) -> list[Trade]:
    return [market_kafka_trade(n, f"S{n % symbols}-USD") for n in range(first, last)]


async def read(address: str, topic: str) -> dict[int, list[Any]]:
    """All that is in a topic: the records of each partition, in order."""
    consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
    await consumer.start()
    try:
        if topic not in await consumer.topics():
            return {}
        places = [TopicPartition(topic, n) for n in await consumer._client._wait_on_metadata(topic)]
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        found: dict[int, list[Any]] = {}
        deadline = time.monotonic() + HANG_LIMIT
        while [await consumer.position(place) for place in places] != [ends[place] for place in places]:
            assert time.monotonic() < deadline
            for place, records in (await consumer.getmany(timeout_ms=50)).items():
                found.setdefault(place.partition, []).extend(records)
        return found
    finally:
        await consumer.stop()


async def read_all(address: str, topic: str) -> list[Any]:
    """All that is in a topic, one partition after the other."""
    return [record for records in (await read(address, topic)).values() for record in records]


async def publish(publisher: mk.Publisher, first: int, last: int, symbols: int = 5) -> None:
    """Such trades, until they are acknowledged."""
    await publisher.trades(market_kafka_trades(first, last, symbols))
    await publisher.flush()


async def market_kafka_ids(address: str, topic: str = "trades") -> list[int]:
    """The trades of a topic; each symbol's have to be in one partition, in their order, without a repetition."""
    ids, places = list[int](), dict[str, int]()
    for partition, records in (await read(address, topic)).items():
        last = dict[str, int]()
        for record in records:
            trade = mt.decode(record.value)
            assert places.setdefault(trade.symbol, partition) == partition
            assert last.get(trade.symbol, -1) < int(trade.trade_id)
            last[trade.symbol] = int(trade.trade_id)
            ids.append(int(trade.trade_id))
    return sorted(ids)


def balanced(publisher: mk.Publisher) -> mk.PublisherStats:
    """What was accepted is somewhere, once."""
    stats = publisher.stats()
    for counts in (stats.trades, stats.analytics):
        assert counts.accepted + counts.recovered == sum(counts[2:]), counts
    return stats


@pytest.fixture
def market_kafka_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """One of the test's own: it may be frozen, stopped, killed."""
    monkeypatch.setattr(producer_module, "BACK_OFF", AT_ONCE)
    monkeypatch.setattr(mt, "BACK_OFF", AT_ONCE)
    with Broker(tmp_path / "broker") as broker:
        yield broker


@contextlib.asynccontextmanager
async def market_kafka_open(address: str, limit: float = HANG_LIMIT, **options: Any) -> AsyncIterator[mk.Publisher]:
    """A publisher; at the end nothing is left of it: no task, thread, descriptor, log handler."""
    tasks, threads, files = asyncio.all_tasks(), set(threading.enumerate()), psutil.Process().num_fds()
    options = {"linger": 0.005, "request_timeout": 0.5, "partitions": 3, **options}
    publisher = mk.Publisher(address, **options)
    with mt.client_log.attached():
        await publisher.start()
        try:
            yield publisher
        finally:
            await publisher.stop(limit)
            balanced(publisher)
            assert publisher.stats().trades.held == publisher.stats().analytics.held == 0
            await ticks(5)
            assert asyncio.all_tasks() == tasks
            now = [each for each in threading.enumerate() if each not in threads]
            assert [each for each in now if each.name.startswith("spool")] == []
            assert psutil.Process().num_fds() <= files


def market_pipeline_options(kafka: str, prefix: str, folder: Path, **more: Any) -> market_flow.MarketOptions:
    exchanges = more.pop("them", None)
    if exchanges is not None:
        more |= {"urls": exchanges.urls, "exchanges": more.get("exchanges", tuple(exchanges.urls))}
    more = {"spool": str(folder / "spool"), "workers": 1, "partitions": 3, "merge_quotes": True, **more}
    return market_flow.MarketOptions(kafka=kafka, prefix=f"{prefix}-", **more)


def market_pipeline_metrics(program: MarketProgram) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(cast("Any", Exporter(md.METRICS, program.snapshot)))
    return generate_latest(registry)


class MarketPipelineBase(MarketProgram):
    """What the three programs have in common, by itself."""

    async def run(self) -> int:
        return 0


ABSENT = "127.0.0.1:9"


def spool_of(publisher: mk.Publisher) -> Spool:
    (spool,) = publisher._trades.spools
    return spool


def is_spilling(publisher: mk.Publisher) -> bool:
    return publisher._trades.backlog.is_spilling()
