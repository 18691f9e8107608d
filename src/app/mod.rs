//! The program: starts the engines in order, and stops them in order.
