"""A service that takes orders, and tells others about them through Postroad.

All that Postroad asks of it is one more INSERT in the transaction that it has anyway. There is no client library, no
broker address and no retry: the message exists if, and only if, the order does.

    DATABASE_URL        the service's own database, which Postroad reads as an origin
    ORDERS              how many orders to place; 0, the default, means until stopped
    ORDERS_PER_SECOND   default 2
"""

import json
import os
import random
import signal
import sys
import threading
import uuid

import psycopg

DATABASE_URL = os.environ["DATABASE_URL"]
ORDERS = int(os.environ.get("ORDERS", "0"))
PAUSE_SECONDS = 1 / float(os.environ.get("ORDERS_PER_SECOND", "2"))

stopping = threading.Event()


class OutOfStock(Exception):
    """The order cannot be taken. Its transaction is rolled back, and its message with it."""


def create_tables(connection: psycopg.Connection) -> None:
    with connection.transaction():
        # Two copies of this service may start at once, and "if not exists" alone does not hold against that.
        connection.execute("select pg_advisory_xact_lock(hashtext('example_shop'))")
        connection.execute("create schema if not exists example_shop")
        connection.execute(
            "create table if not exists example_shop.stock (product text primary key, quantity int not null check (quantity >= 0))"
        )
        connection.execute(
            "create table if not exists example_shop.orders (id uuid primary key, product text not null, quantity int not null)"
        )
        connection.execute(
            "insert into example_shop.stock values ('tea', 1000000), ('coffee', 1000000), ('salt', 3) on conflict do nothing"
        )


def place_order(connection: psycopg.Connection, product: str, quantity: int) -> uuid.UUID:
    order = uuid.uuid4()
    with connection.transaction():
        # The lock on the stock row comes before the insert into the outbox. That is what keeps the messages of one product
        # in order: the next transaction on it cannot insert its message before this one has ended.
        (in_stock,) = connection.execute(
            "select quantity from example_shop.stock where product = %s for update", (product,)
        ).fetchone()
        if in_stock < quantity:
            raise OutOfStock(product)
        connection.execute(
            "update example_shop.stock set quantity = quantity - %s where product = %s", (quantity, product)
        )
        connection.execute(
            "insert into example_shop.orders (id, product, quantity) values (%s, %s, %s)", (order, product, quantity)
        )
        event = {"order": str(order), "product": product, "quantity": quantity}
        connection.execute(
            "insert into postroad.outbox (topic, key, payload) values ('orders.created', %s, %s)",
            (product, json.dumps(event)),
        )
    return order


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    placed = tried = 0
    with psycopg.connect(DATABASE_URL, autocommit=True) as connection:
        create_tables(connection)
        while not stopping.is_set() and (ORDERS == 0 or tried < ORDERS):
            tried += 1
            product = random.choice(["tea", "coffee", "salt"])
            quantity = random.randint(1, 3)
            try:
                order = place_order(connection, product, quantity)
                placed += 1
                print(f"placed order {order}: {quantity} {product}", flush=True)
            except OutOfStock:
                print(f"out of {product}: rolled back, no message", flush=True)
            stopping.wait(PAUSE_SECONDS)
    print(f"stopped after {placed} orders", flush=True)


if __name__ == "__main__":
    sys.exit(main())
