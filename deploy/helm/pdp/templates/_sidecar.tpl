{{/*
What another chart takes to put the sidecar into its own pods, with this chart as a
dependency (docs/kubernetes.md):

  labels:          agent-pdp/inject: enabled (what NetworkPolicy and PodMonitor select by)
  initContainers:  {{ include "pdp.container" .Subcharts.pdp | nindent 4 }}
  volumes:         {{ include "pdp.volumes" .Subcharts.pdp | nindent 4 }}
  in the agent's container:
    env:           {{ include "pdp.agentEnv" .Subcharts.pdp | nindent 8 }}
    volumeMounts:  {{ include "pdp.agentMounts" .Subcharts.pdp | nindent 8 }}

Each include is a YAML list.
*/}}

{{- define "pdp.image" -}}
{{- $image := .Values.image -}}
{{- $name := required "image.repository is required: where the sidecar's image is" $image.repository -}}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "pdp.pullSecrets" -}}
{{- range .Values.image.pullSecrets }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{- define "pdp.configYaml" -}}
{{- range $key := list "state_dir" "instance" "listen" -}}
{{- if hasKey $.Values.config $key -}}
{{- fail (printf "config.%s is set by the chart: leave it out" $key) -}}
{{- end -}}
{{- end -}}
{{- $_ := required "config.identity is required: whose tokens are trusted" .Values.config.identity -}}
{{- $_ := required "config.policy is required: what decides" .Values.config.policy -}}
{{- $limits := mergeOverwrite (dict "drain_seconds" .Values.drainSeconds) (deepCopy (.Values.config.limits | default dict)) -}}
{{- $listen := dict "unix" "/run/pdp/pdp.sock" "unix_mode" "0660" "metrics" (printf "%s:%d" .Values.metricsHost (int .Values.metricsPort)) -}}
{{- merge (dict "state_dir" "/var/lib/pdp/state" "listen" $listen "limits" $limits) (deepCopy .Values.config) | toYaml -}}
{{- end -}}

{{- define "pdp.container" -}}
{{- if and .Values.nativeSidecar (semverCompare "<1.29.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail "nativeSidecar: this cluster has none, which begin with 1.29; set it to false" -}}
{{- end -}}
- name: pdp
  image: {{ include "pdp.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: ["serve", "--config", "/etc/pdp/config/pdp.yaml"]
  {{- if .Values.nativeSidecar }}
  restartPolicy: Always
  {{- else }}
  lifecycle:
    preStop:
      exec:
        # A plain container is stopped together with the agent, which is to be done first.
        command: ["python3", "-c", "import time; time.sleep({{ .Values.drainSeconds }})"]
  {{- end }}
  env:
    - name: POD_NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
    # A name alone is not unique: pods of StatefulSets have it once in each namespace.
    - name: PDP_INSTANCE
      value: $(POD_NAMESPACE)/$(POD_NAME)
    {{- with .Values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: pdp-metrics
      containerPort: {{ .Values.metricsPort }}
      protocol: TCP
  startupProbe:
    httpGet:
      path: /readyz
      port: pdp-metrics
    periodSeconds: 1
    failureThreshold: {{ .Values.startSeconds }}
  readinessProbe:
    httpGet:
      path: /readyz
      port: pdp-metrics
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 2
  livenessProbe:
    httpGet:
      path: /healthz
      port: pdp-metrics
    # A sidecar that is slow, for want of CPU, is not helped by a restart.
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ .Values.userId }}
    runAsGroup: {{ .Values.groupId }}
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: ["ALL"]
    seccompProfile:
      type: RuntimeDefault
  volumeMounts:
    - name: pdp-socket
      mountPath: /run/pdp
    - name: pdp-state
      mountPath: /var/lib/pdp
    - name: pdp-tmp
      mountPath: /tmp
    - name: pdp-config
      mountPath: /etc/pdp/config
      readOnly: true
    # In the place of the pod's service-account token, which the sidecar has no use for.
    - name: pdp-no-token
      mountPath: /var/run/secrets/kubernetes.io/serviceaccount
      readOnly: true
    {{- if .Values.policyConfigMap }}
    - name: pdp-policy
      mountPath: /etc/pdp/policy
      readOnly: true
    {{- end }}
    {{- range .Values.secrets }}
    - name: pdp-secret-{{ .name }}
      mountPath: /etc/pdp/secrets/{{ .name }}
      readOnly: true
    {{- end }}
    {{- range .Values.files }}
    - name: pdp-file-{{ .name }}
      mountPath: /etc/pdp/files/{{ .name }}
      readOnly: true
    {{- end }}
{{- end -}}

{{- define "pdp.volumes" -}}
- name: pdp-socket
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: pdp-state
  {{- toYaml .Values.state.volume | nindent 2 }}
- name: pdp-tmp
  emptyDir:
    sizeLimit: 64Mi
- name: pdp-no-token
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: pdp-config
  configMap:
    name: {{ include "pdp.configName" . }}
{{- if .Values.policyConfigMap }}
- name: pdp-policy
  configMap:
    name: {{ .Values.policyConfigMap }}
{{- end }}
{{- range .Values.secrets }}
- name: pdp-secret-{{ .name }}
  secret:
    secretName: {{ .secretName }}
    defaultMode: 0400
{{- end }}
{{- range .Values.files }}
- name: pdp-file-{{ .name }}
  configMap:
    name: {{ .configMap }}
{{- end }}
{{- if .Values.workloadToken.enabled }}
- name: pdp-workload-token
  projected:
    sources:
      - serviceAccountToken:
          audience: {{ .Values.workloadToken.audience }}
          expirationSeconds: {{ .Values.workloadToken.expirationSeconds }}
          path: token
{{- end }}
{{- end -}}

{{- define "pdp.agentEnv" -}}
- name: PDP_TARGET
  value: unix:///run/pdp/pdp.sock
{{- if .Values.workloadToken.enabled }}
- name: PDP_WORKLOAD_TOKEN_FILE
  value: /var/run/secrets/agent-pdp/token
{{- end }}
{{- end -}}

{{- define "pdp.agentMounts" -}}
- name: pdp-socket
  mountPath: /run/pdp
{{- if .Values.workloadToken.enabled }}
- name: pdp-workload-token
  mountPath: /var/run/secrets/agent-pdp
  readOnly: true
{{- end }}
{{- end -}}

{{/* Injected pods, wherever they are, have it by one name. */}}
{{- define "pdp.configName" -}}
{{- if not .Chart.IsRoot }}{{ .Release.Name }}-{{ end }}pdp-config
{{- end -}}

{{- define "pdp.labels" -}}
app.kubernetes.io/name: pdp
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
