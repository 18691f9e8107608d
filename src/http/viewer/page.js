// Shows the description of this broker's API. All of it comes from the broker: the page needs no other network.
SwaggerUIBundle({
  dom_id: "#api",
  url: "openapi.yaml",
  validatorUrl: null,
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  filter: true,
});
