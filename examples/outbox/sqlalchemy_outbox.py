"""Publishing through the outbox with SQLAlchemy: one insert in the transaction that is there anyway.

    with Session(engine) as session, session.begin():
        session.execute(update(Stock).where(Stock.product == "tea").values(quantity=Stock.quantity - 1))
        publish(session, "orders.created", {"order": 1}, key="tea")
"""

import json
import os
import uuid

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

INSERT = text(
    "insert into postroad.outbox (id, topic, key, payload, content_type, headers)"
    " values (:id, :topic, :key, :payload, 'application/json', cast(:headers as jsonb))"
)


def publish(session: Session, topic: str, payload: object, key: str | None = None, headers: dict | None = None) -> str:
    """`session` may be a Connection too. Update the row that the key stands for first: that keeps its messages in order."""
    message = str(uuid.uuid4())
    session.execute(
        INSERT,
        {
            "id": message,
            "topic": topic,
            "key": key,
            "payload": json.dumps(payload),
            "headers": json.dumps(headers) if headers else None,
        },
    )
    return message


if __name__ == "__main__":
    url = os.environ["DATABASE_URL"].replace("postgres://", "postgresql://", 1).replace("postgresql://", "postgresql+psycopg://", 1)
    with Session(create_engine(url)) as session, session.begin():
        print(publish(session, "orders.created", {"from": "sqlalchemy"}, key="tea", headers={"traceparent": "00-1"}))
    with Session(create_engine(url)) as session:
        publish(session, "orders.created", {"from": "nowhere"})
        session.rollback()
