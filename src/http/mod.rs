//! The HTTP API: routes, wire types, problem details, OpenAPI.
