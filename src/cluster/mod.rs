//! Nodes and leases: who is alive, and who may write what.
