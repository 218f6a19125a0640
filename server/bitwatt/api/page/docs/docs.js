// The API's description, shown by Swagger UI: asked for with the key that this tab keeps.

import { getJson, keepKey, withKey } from "../api.js";

const byId = (id) => document.getElementById(id);

async function show() {
  let spec;
  try {
    spec = await getJson("/openapi.json");
  } catch (error) {
    byId("key-form").hidden = error.status !== 401;
    byId("problem").hidden = error.status === 401;
    byId("problem").textContent = error.message;
    if (error.status === 401) byId("key").focus();
    return;
  }
  byId("key-form").hidden = true;
  byId("problem").hidden = true;
  window.SwaggerUIBundle({
    spec,
    dom_id: "#api",
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    docExpansion: "list",
    validatorUrl: null,
    requestInterceptor: (request) => ({ ...request, headers: withKey(request.headers) }),
  });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value);
  byId("key").value = "";
  show();
});

show();
