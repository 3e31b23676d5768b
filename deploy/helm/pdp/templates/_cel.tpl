{{/* A value as a CEL literal, in which lists and maps may hold what they like. */}}
{{- define "pdp.cel" -}}
{{- if kindIs "map" . -}}
{ {{- $first := true -}}
{{- range $key, $value := . -}}
{{- if not $first }}, {{ end -}}{{- $first = false -}}
{{ $key | toJson }}: dyn({{ include "pdp.cel" $value }})
{{- end -}} }
{{- else if kindIs "slice" . -}}
[ {{- range $index, $value := . -}}
{{- if $index }}, {{ end -}}
dyn({{ include "pdp.cel" $value }})
{{- end -}} ]
{{- else if kindIs "float64" . -}}
{{ int64 . }}
{{- else -}}
{{ . | toJson }}
{{- end -}}
{{- end -}}

{{/* A list of objects as CEL literals of a type of Kubernetes: {"value": ..., "type": ...}. */}}
{{- define "pdp.celTyped" -}}
{{- $type := .type -}}
[ {{- range $index, $item := .value -}}
{{- if $index }}, {{ end -}}
{{ $type }}{ {{- $first := true -}}
{{- range $key, $value := $item -}}
{{- if not $first }}, {{ end -}}{{- $first = false -}}
{{ $key }}: {{ $value | toJson }}
{{- end -}} }
{{- end -}} ]
{{- end -}}
