"""The tables of the ledger in SQLite."""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 2

SCHEMA: Final = """
-- The highest time seen, so that the store's clock never runs backwards.
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    highest INTEGER NOT NULL
) STRICT;
INSERT INTO clock VALUES (1, 0);

CREATE TABLE account (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- no id is used again: holds and operators name them
    tenant TEXT NOT NULL, -- '' where an organisation's tenants count together
    limit_id TEXT NOT NULL,
    counts_for TEXT NOT NULL, -- with tenant '', the organisation
    window_start INTEGER NOT NULL,
    budget TEXT NOT NULL,
    unit TEXT NOT NULL,
    scope TEXT NOT NULL,
    window_kind TEXT NOT NULL, -- of a rate with its seconds: 'rolling:60'
    window_end INTEGER,
    over_at INTEGER, -- from when on nothing counts here; NULL for a lifetime
    named_as TEXT NOT NULL, -- the limit as it was named last, see receipt_json
    spent INTEGER NOT NULL CHECK (spent BETWEEN 0 AND 9007199254740991),
    held INTEGER NOT NULL DEFAULT 0 CHECK (held BETWEEN 0 AND 9007199254740991),
    granted INTEGER NOT NULL DEFAULT 0 CHECK (granted BETWEEN 0 AND 9007199254740991),
    warned INTEGER NOT NULL, -- the highest percent that was warned of
    level INTEGER NOT NULL CHECK (level BETWEEN 0 AND 9007199254740991),
    drained_at INTEGER NOT NULL, -- milliseconds; level is from then
    UNIQUE (
        tenant, limit_id, counts_for, window_start, budget, unit, scope, window_kind
    )
) STRICT;
CREATE INDEX account_by_end ON account (over_at) WHERE over_at IS NOT NULL;

-- Holds, and charges that were made at once: settled from the start.
CREATE TABLE hold (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    actor TEXT NOT NULL,
    tool TEXT NOT NULL,
    operation TEXT NOT NULL, -- that made it
    made_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, -- 0 for a charge
    state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'released')),
    memo TEXT NOT NULL,
    parts TEXT NOT NULL -- JSON: see sqlite_holds
) STRICT, WITHOUT ROWID;
CREATE INDEX open_hold ON hold (tenant, expires_at) WHERE state = 'open';

-- What counts in account.held: what is left of the parts of holds that are neither ended
-- nor, as far as anybody has looked at the account, expired.
CREATE TABLE live_part (
    account INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    hold TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    mode TEXT NOT NULL, -- what becomes of it on expiry: see sqlite_accounts
    PRIMARY KEY (account, expires_at, hold)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER live_part_added AFTER INSERT ON live_part BEGIN
    UPDATE account SET held = held + NEW.amount WHERE id = NEW.account;
END;
CREATE TRIGGER live_part_less AFTER UPDATE OF amount ON live_part BEGIN
    UPDATE account SET held = held - OLD.amount + NEW.amount WHERE id = NEW.account;
END;
CREATE TRIGGER live_part_gone AFTER DELETE ON live_part BEGIN
    UPDATE account SET held = held - OLD.amount WHERE id = OLD.account;
END;

-- First answers, for those who try again. A hold is as old as its answer, and is
-- cleared away with it.
CREATE TABLE answer (
    sequence INTEGER PRIMARY KEY, -- in the order of the store's clock
    tenant TEXT NOT NULL,
    actor TEXT NOT NULL,
    operation TEXT NOT NULL,
    key TEXT NOT NULL,
    content_sha256 TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    note TEXT NOT NULL,
    receipt TEXT NOT NULL,
    hold TEXT, -- that it made
    UNIQUE (tenant, actor, operation, key)
) STRICT;
"""
